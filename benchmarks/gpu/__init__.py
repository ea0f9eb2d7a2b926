"""Everything that a card is to do, measured in one go: `python -m benchmarks.gpu --all --minutes 8 --out FILE`."""
