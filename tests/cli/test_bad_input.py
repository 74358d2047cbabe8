"""Bad input of every kind, 340 cases of it; campaigns/bad_input.py draws 10,000."""

import pytest
import torch

from campaigns import bad_input

CASES = {
    "study": 40,
    "report": 10,
    "flags": 75,
    "yaml": 75,
    "data": 60,
    "rows": 40,
    "model": 30,
    "run": 10,
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a tiny model gains nothing from more, and a case has ten seconds
    yield bad_input.Ground(tmp_path_factory.mktemp("ground"))
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")  # of libraries, about what they are given
@pytest.mark.parametrize("kind", bad_input.KINDS)
def test_every_case_is_answered_with_a_word(ground, kind):
    bad_input.campaign(ground, kind, CASES[kind])
