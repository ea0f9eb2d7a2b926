"""Pages keep their word: every Python block runs, figures of the project agree, and the first page stays short.

Models and SAEs that a page takes from the hub are stood in for by small random ones, with a tokenizer of the page's
own words: what a page calls exists and works, what it would find isn't tested here.
"""

import importlib.util
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests import architectures
from tests.sae.training import PlainSAE

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
SITE = "https://tl-circuitlasso.github.io/tl_circuitlasso/"
CODE = "https://github.com/tl-circuitlasso/tl_circuitlasso"
RAW = "https://raw.githubusercontent.com/tl-circuitlasso/tl_circuitlasso"


def blocks(page: Path) -> list[str]:
    """The page's Python blocks."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def tokenizer(text: str, folder: Path) -> Any:
    """Whole words and the marks between them; what isn't in `text` is unknown. Read from `folder`, as is demanded."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = dict.fromkeys(["<unk>", "<s>", "</s>", *re.findall(r"\w+|[^\w\s]+", text)])
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    plain.normalizer, plain.pre_tokenizer = normalizers.Strip(), pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Stand-ins for what pages download: call it with a page's code."""

    def stand_in(code: str) -> None:
        if "HookedTransformer" in code:
            words = tokenizer(code, tmp_path_factory.mktemp("words"))
            lens = pytest.importorskip("transformer_lens")
            model = architectures.hooked("gpt2", d_vocab=len(words))
            model.set_tokenizer(words, default_padding_side="right")
            for name in ("from_pretrained", "from_pretrained_no_processing"):
                monkeypatch.setattr(lens.HookedTransformer, name, lambda *_, **__: model)
        if "sae_lens" in code:
            sae_lens = pytest.importorskip("sae_lens", reason="sae_lens isn't installed")
            monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda release, sae_id: plain(sae_id))

    yield stand_in


def plain(sae_id: str, features: int = 12, width: int = 24) -> PlainSAE:
    """Random directions of the small model's width, each firing on about half of the samples."""
    generator = torch.Generator().manual_seed(len(sae_id) + int(sae_id.split(".")[1]))
    directions = torch.nn.functional.normalize(torch.randn(features, width, generator=generator), dim=1)
    return PlainSAE(directions.T.contiguous(), directions, torch.zeros(features))


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).with_suffix("").as_posix()


def run(code: str, page: Path, names: dict[str, Any]) -> None:
    exec(compile(code, str(page), "exec"), names)


@pytest.fixture(scope="module")
def first_block(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], set[str]]:
    """What the first page's first block, run before all others, leaves behind: names, and endings of files."""
    folder, names = tmp_path_factory.mktemp("first"), {"__name__": "readme"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(blocks(README)[0], README, names)
    return names, {path.suffix for path in folder.iterdir()}


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page)], ids=page_id)
def test_the_code_of_a_page_runs(page: Path, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(page))
    hub(code)
    run(code, page, {"__name__": page.stem})


def test_no_python_hides_from_the_tests() -> None:
    fences = re.compile(r"^ *```+ *(\w*)", re.MULTILINE)
    for page in PAGES:
        languages = fences.findall(page.read_text(encoding="utf-8"))[::2]
        assert set(languages) <= {"python", "bash", "bibtex", "text"}, page_id(page)


# ---- the first page -------------------------------------------------------------------------------------------------


def test_the_first_page_is_short_and_its_first_block_needs_nothing_else(first_block: Any) -> None:
    assert len(README.read_text(encoding="utf-8")) < 9000
    first = blocks(README)[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 8
    assert first_block[1] == {".png", ".html"}


def test_the_other_blocks_of_the_first_page_run_behind_it(
    first_block: Any, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub("\n".join(blocks(README)))
    run("\n".join(blocks(README)[1:]), README, dict(first_block[0]))


def test_the_first_page_shows_its_pictures_wherever_it_is_shown() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README.read_text(encoding="utf-8"))
    assert all(link.startswith("https://") for link in links)
    for link in links:
        if link.startswith(SITE) and link != SITE:
            name = link.removeprefix(SITE).removesuffix(".html")
            assert (ROOT / "docs" / f"{name}.md").is_file(), link
        for start in (
            f"{CODE}/blob/main/",
            f"{CODE}/tree/main/",
            CODE.replace("github.com", "raw.githubusercontent.com"),
        ):
            if link.startswith(start):
                assert (ROOT / link.removeprefix(start).removeprefix("/main/")).exists(), link


def test_the_first_page_has_the_commands_of_a_newcomer() -> None:
    text = README.read_text(encoding="utf-8")
    for name, what in (("run", "circuitlasso demo --out circuit"), ("test", "python -m pytest")):
        fence = re.search(rf"^<!-- newcomer: {name} -->\n```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        assert fence is not None and what in fence[1]


# ---- what is said in several places ---------------------------------------------------------------------------------


def test_versions_and_addresses_agree() -> None:
    import tl_circuitlasso

    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == tl_circuitlasso.__version__ == citation["version"]
    assert project["urls"]["Source"] == citation["repository-code"] == CODE
    assert project["urls"]["Documentation"] == SITE
    assert f"repo_url: {CODE}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_every_page_is_in_the_contents() -> None:
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [*(page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:])]
    pages += [f"tutorials/{path.name}" for path in (ROOT / "tutorials").glob("*.ipynb")]
    assert [page for page in pages if f": {page}\n" not in contents] == []


def test_links_of_a_site_are_followed(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("links", ROOT / "docs" / "site" / "links.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["links"] = module  # where a dataclass looks for its module
    spec.loader.exec_module(module)
    (tmp_path / "a").mkdir()
    (tmp_path / "index.html").write_text('<h2 id="there"></h2><a href="a/b.html#here">b</a> <a href="#there">t</a>')
    (tmp_path / "a" / "b.html").write_text(
        '<a id="here" href="../index.html#away">i</a><img src="https://x.org/p.png">'
    )
    (tmp_path / "llms.txt").write_text("- [b](a/b.html)\n- [c](a/c.html)\n")
    found = module.follow(tmp_path)
    assert (found.pages, found.followed) == (2, 5)
    assert set(found.dead) == {("a/b.html", "../index.html#away"), ("llms.txt", "a/c.html")}


def test_a_bare_install_is_listed_whole() -> None:
    from benchmarks.installed import closure, direct, sizes

    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("## What a bare install brings")[2]
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert all(re.search(rf"\b{re.split('[<>=]', need)[0]}\b", table) for need in needed)
    assert "numpy" in direct("pandas") and {"numpy", "pandas"} <= closure(["pandas"])
    own, saved = sizes("pandas")["numpy"]
    assert 10e6 < own <= saved


def test_a_real_models_circuit_is_the_tutorials() -> None:
    from PIL import Image

    from benchmarks.gallery import LARGEST, drawn_by_the_tutorial

    shown = ROOT / "tutorials" / "images" / "real_circuit.png"
    assert f"{RAW}/main/tutorials/images/{shown.name}" in README.read_text(encoding="utf-8")
    assert shown.stat().st_size < LARGEST
    pictures = [Image.open(file).convert("RGB") for file in (shown, io.BytesIO(drawn_by_the_tutorial()))]
    ours, theirs = (np.asarray(picture).astype(int) for picture in pictures)
    again = "python -m benchmarks.gallery --out tutorials/images --only real_circuit"
    assert ours.shape == theirs.shape, again
    assert int(np.abs(ours - theirs).max()) < 10, again  # also of the thin lines that say which colour is which port
