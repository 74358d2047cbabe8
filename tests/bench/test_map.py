"""What ``iterbatch price`` says repeats were worth: the study most like a setting, and its records."""

import importlib
import json
from pathlib import Path

from iterbatch.bench.map import FILE, WAYS, MapCell, Worth, cells, nearest

ROOT = Path(__file__).parents[2]


def _cell(tokens, ratio, seeds=8, **worth):
    found = {way: Worth(*numbers) for way, numbers in worth.items()}
    return MapCell("s", "m", "t", tokens, ratio, seeds, found)


def test_the_nearest_is_near_in_tokens_and_in_price():
    among = [_cell(512, 1.0), _cell(512, 0.6), _cell(4096, 0.6), _cell(4096, 0.6, seeds=9)]
    assert nearest(600, 0.95, among) is among[0]
    assert nearest(600, 0.65, among) is among[1]
    assert nearest(8000, 0.9, among) is among[3]  # more seeds


def test_a_way_to_repeat_is_advised_only_where_it_paid_beyond_chance():
    assert _cell(512, 1.0, at_once=(1.2, 0.9, 1.5), later=(0.9, 0.8, 1.0)).best is None
    assert _cell(512, 1.0, at_once=(1.1, 1.05, 1.2), later=(1.2, 1.1, 1.3)).best == "later"
    assert _cell(512, 1.0, smaller=(2.0, 1.9, 2.1)).best is None  # not a repeat


def test_every_cell_is_whole():
    assert cells()
    for cell in cells():
        assert set(cell.worth) <= set(WAYS)
        assert all(one.low < one.estimate < one.high for one in cell.worth.values())
        assert 0 < cell.price_ratio <= 1


def test_the_map_is_what_the_records_say(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    findings = importlib.import_module("findings")
    findings.write_map(tmp_path, tmp_path / "map.json")
    assert json.loads((tmp_path / "map.json").read_text()) == json.loads(FILE.read_text())
