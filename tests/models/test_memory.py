"""What is free to a process in a container."""

from pathlib import Path

import pytest

from tl_circuitlasso.models import memory


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "1000", "memory.current": "700"}, 300),
        (
            {
                "memory.max": "1000",
                "memory.current": "900",
                "memory.stat": "anon 5\ninactive_file 600\nactive_file 1\n",
            },
            700,
        ),
        ({"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 5\n"}, 100),
        ({"memory.max": "max", "memory.current": "900"}, None),
        ({"memory.max": "1000"}, None),
    ],
)
def test_cached_files_count_as_free(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable: 4 kB\n")
    assert memory.free_bytes(meminfo=meminfo, cgroup=tmp_path) == (4096 if expected is None else expected)
