"""Patient scripts load, split and are drawn the same way every time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from m2train.verifier import CaseSampler, load_cases, split_cases

CASES = load_cases()


def test_every_script_can_be_interviewed() -> None:
    assert len(CASES) >= 64
    for case in CASES:
        essential = [fact for fact in case.facts if fact.essential and fact.disclose == "on_ask"]
        assert len(essential) >= 2, f"{case.id} has too little to ask for"
        assert any(fact.disclose == "volunteered" for fact in case.facts), case.id
        assert all(not fact.essential for fact in case.facts if fact.disclose == "never"), case.id


def test_split_is_a_stratified_partition() -> None:
    train, held_out = split_cases(CASES)
    assert {c.id for c in train} | {c.id for c in held_out} == {c.id for c in CASES}
    assert not {c.id for c in train} & {c.id for c in held_out}
    assert len(held_out) >= 32
    ours, theirs = (Counter(c.specialty for c in half) for half in (train, held_out))
    for specialty in {c.specialty for c in CASES}:
        assert abs(ours[specialty] - theirs[specialty]) <= 1, specialty
    assert split_cases(CASES) == (train, held_out)
    assert split_cases(CASES[::-1]) == (train, held_out)  # the order of files on disk does not matter


def test_sampler_repeats_nothing_within_an_epoch() -> None:
    train = split_cases(CASES).train
    sampler = CaseSampler(train, seed=3)
    drawn = [case.id for step in range(len(train) // 4) for case in sampler.draw(step, 4)]
    assert Counter(drawn) == Counter(case.id for case in train)
    later = [case.id for step in range(len(train) // 4, len(train) // 2) for case in sampler.draw(step, 4)]
    assert Counter(later) == Counter(drawn)
    assert later != drawn


def test_sampler_is_a_function_of_seed_and_step() -> None:
    train = split_cases(CASES).train
    assert CaseSampler(train, 3).draw(5, 4) == CaseSampler(train[::-1], 3).draw(5, 4)
    assert CaseSampler(train, 3).draw(0, 8) != CaseSampler(train, 4).draw(0, 8)


def test_a_step_mixes_specialties() -> None:
    train = split_cases(CASES).train
    sampler = CaseSampler(train, seed=0)
    for step in range(4):
        assert len({case.specialty for case in sampler.draw(step, 8)}) >= 5


def test_a_broken_script_is_named(tmp_path: Path) -> None:
    (tmp_path / "x_01.toml").write_text('id = "x_01"\nspecialty = "x"\n')
    with pytest.raises(ValueError, match="x_01.toml"):
        load_cases(tmp_path)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no patient scripts"):
        load_cases(tmp_path)
