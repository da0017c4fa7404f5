"""What stands out in trainings: each rule with runs in which it speaks, and with runs in which it does not."""

import numpy as np
import pytest

from f2c_plugin.tools.findings import findings
from f2c_plugin.tools.runs import Run

CONFIG = {"num_image": "480", "num_epoch": "1", "frequent": "10", "seed": "1", "rec": "faces", "fp16": "False"}


def run(name, step=60, config=None, entries=(), **fields):
    """A run of steps of 8 images, with a last entry of the history and others before; verified on a set of its own."""
    history = [{"step": 0, "images": 0, f"{name}/accuracy": 0.9},
               *({"step": step, "images": 8 * step, **entry} for entry in entries), {"step": step, "images": 8 * step}]
    return Run(name, history, CONFIG | (config or {}), **fields)


def verified(name, right, seed=0, pairs=1000):
    """A run that answers a share of the pairs of a set right, other pairs for each seed."""
    same = np.arange(pairs) % 2 == 0
    is_right = np.random.default_rng(seed).permutation(pairs) < right * pairs
    return run(name, entries=[{"lfw/accuracy": right}], scores={"lfw": (np.where(is_right == same, 0.8, 0.1), same)})


def test_two_runs_alike_have_nothing_that_stands_out():
    assert findings([run("a"), run("b")]) == findings([run("a")]) == []


@pytest.mark.parametrize("step, speaks", [(59, True), (60, False)])
def test_different_numbers_of_images_are_unfair(step, speaks):
    sentences = findings([run("a"), run("b", step)])
    assert bool(sentences) == speaks
    if speaks:
        assert sentences[0].startswith("The runs have seen different numbers of images, from 472 (b) to 480 (a): compare")


@pytest.mark.parametrize("changed, sentence", [
    ({"rec": "other"}, "The runs differ in their data (rec): a difference may come from that."),
    ({"num_classes": "9"}, "The runs differ in their data (num_classes): a difference may come from that."),
    ({"seed": "2"}, "The runs differ in nothing but the seed: the spread of their figures is chance."),
    ({"seed": "2", "lr": "0.2"}, "The runs do not share one seed, so a part of every difference is chance."),
    ({"lr": "0.2"}, None), ({"output": "there"}, None)])
def test_other_data_and_other_seeds_are_named(changed, sentence):
    assert findings([run("a"), run("b", config=changed)]) == ([sentence] if sentence else [])


def test_a_run_of_which_no_config_is_recorded_differs_in_nothing():
    old = run("old")
    old.config = {}
    assert not findings([run("a"), old])


@pytest.mark.parametrize("step, config, speaks", [(50, {}, True), (51, {}, False), (51, {"frequent": "5"}, True),
                                                  (50, {"num_image": "?"}, False), (50, {"num_epoch": "2"}, True)])
def test_a_run_that_is_not_at_its_end_is_named(step, config, speaks):
    sentences = findings([run("a", step, config)])
    assert bool(sentences) == speaks
    if config.get("num_epoch"):
        assert sentences == ["a has seen 400 of its 960 images: it has stopped early, or is not at its end yet."]


@pytest.mark.parametrize("fields, config, entries, sentence", [
    ({"not_finite_losses": [20]}, {}, (), "its loss was not finite at step 20."),
    ({"not_finite_losses": [20, 30, 40]}, {}, (), "its loss was not finite at step 20 and at 2 later entries of the log."),
    ({"skipped_steps": 1}, {}, (), "1 of its 60 steps were skipped because their gradient was not finite."),
    ({"skipped_steps": 4}, {"fp16": "True"}, (), "4 of its 60 steps were skipped because their gradient was not finite."),
    ({"skipped_steps": 3}, {"fp16": "True"}, (), None),
    ({}, {}, [{"f2c/not_finite": 2.0}, {"f2c/not_finite": 1.0}], "3 features were not finite and stayed out of its pool."),
    ({}, {}, [{"f2c/not_finite": 0.0}], None)])
def test_numbers_that_are_not_finite_are_counted(fields, config, entries, sentence):
    expected = [f"a has met numbers that are not finite: {sentence}"] if sentence else []
    assert findings([run("a", config=config, entries=entries, **fields)]) == expected


def test_the_best_run_is_told_from_those_that_may_be_as_good_by_chance():
    best, close, far = verified("best", 0.95), verified("close", 0.945, seed=1), verified("far", 0.8, seed=2)
    assert findings([far, close, best]) == ["lfw: best is best with 95.00% in the last verification, but its lead over close "
                                            "is within 2 standard errors of the difference and may be chance."]
    sentence, = findings([far, best])
    assert sentence.startswith("lfw: best is best with 95.00% in the last verification, 15.00 points ahead of far: ")
    assert 0.5 < float(sentence.split("far: ")[1].split(" points are one standard error")[0]) < 2


def test_the_standard_error_is_paired_by_the_folds():
    """Two runs that fail on the same pairs, but for 20, differ by more than chance, though either alone is as uncertain."""
    first, second = verified("first", 0.8), verified("second", 0.78)
    assert "2.00 points ahead of second: " in findings([first, second])[0]
    assert "may be chance" in findings([first, verified("second", 0.78, seed=1)])[0]


def test_without_scores_the_logged_deviations_count():
    first, far, near, unknown = (run(name, entries=[{"lfw/accuracy": accuracy} | deviation]) for name, accuracy, deviation in (
        ("first", 0.9, {"lfw/accuracy_std": 0.01}), ("far", 0.82, {"lfw/accuracy_std": 0.01}),
        ("near", 0.895, {"lfw/accuracy_std": 0.01}), ("unknown", 0.8, {})))
    assert "8.00 points ahead of far: 0.47 points are one standard error" in findings([first, far])[0]
    assert "its lead over near is within 2 standard errors" in findings([first, near])[0]
    assert findings([first, unknown])[0].endswith("10.00 points ahead of unknown; whether that is chance is not recorded.")


def test_a_set_that_one_run_was_verified_on_or_that_has_other_pairs_is_not_compared():
    assert not findings([verified("a", 0.9), run("b")])
    sentence, = findings([verified("a", 0.9), verified("b", 0.6, pairs=500)])
    assert sentence == "lfw: the runs were verified on different pairs, so their accuracies are not compared."


def test_runs_that_were_never_verified_are_named():
    runs = [run(name) for name in "abc"]
    for each in runs[:2]:
        del each.history[0]
    assert findings(runs) == ["a and b were never verified, so that nothing shows what was learnt: name sets in val_targets, "
                              "or give the model.pt to `f2c-plugin evaluate`."]
    assert findings(runs[:1])[0].startswith("a was never verified")


@pytest.mark.parametrize("accuracy, same, speaks", [
    (0.5, 0.5, "50.00%, within 2 standard errors of chance (50.00% ± 1.58%)"), (0.531, 0.5, "53.10%, within 2 standard errors"),
    (0.532, 0.5, ""), (0.85, 0.9, "85.00%, within 2 standard errors of chance (90.00% ± 0.95%)"), (0.92, 0.9, "")])
def test_an_accuracy_that_the_pairs_do_not_tell_from_chance_is_named(accuracy, same, speaks):
    scores = {"lfw": (np.zeros(1000), np.arange(1000) < 1000 * same)}
    sentences = findings([run("a", entries=[{"lfw/accuracy": accuracy}], scores=scores)])
    assert [f"lfw: a has learnt nothing that shows: its last accuracy is {speaks}" in each for each in sentences] == [
        True] * bool(speaks)


@pytest.mark.parametrize("accuracy, std, speaks", [(0.53, 0.06, True), (0.55, 0.06, False), (0.5, None, True),
                                                   (0.51, None, False), (0.5, 0.0, True)])
def test_without_scores_the_deviation_of_the_folds_says_how_far_chance_reaches(accuracy, std, speaks):
    entry = {"lfw/accuracy": accuracy} | ({} if std is None else {"lfw/accuracy_std": std})
    assert [each.startswith("lfw: a has learnt nothing") for each in findings([run("a", entries=[entry])])] == [True] * speaks


@pytest.mark.parametrize("divergence, speaks", [(0.995, True), (0.98, False), (0.03, False)])
def test_embeddings_that_are_all_the_same_have_collapsed(divergence, speaks):
    entries = [{"lfw/gallery_accuracy": 0.9, "lfw/gallery_divergence": divergence}]
    sentences = findings([run("a", entries=entries)])
    assert [each.startswith("gallery_lfw: a has collapsed: its embeddings of different people have a cosine of 0.995")
            for each in sentences] == [True] * speaks


@pytest.mark.parametrize("derived, sentence", [
    (None, None), (64, "a: its log holds no total_batch_size; by its speeds and times a step has 64 images."),
    (1, "a: its log holds no total_batch_size, nor two speeds from which it could be found: its steps are counted as images, "
        "and its hours are wrong.")])
def test_a_log_without_the_batch_size_is_named(derived, sentence):
    assert findings([run("a", derived_batch=derived)]) == ([sentence] if sentence else [])


def test_runs_that_are_slower_by_more_than_a_fifth_are_named():
    fast, near, slow = (run(name, entries=[{"images_per_second": speed}]) for name, speed in
                        (("fast", 1000.0), ("near", 800.0), ("slow", 790.0)))
    assert findings([slow, near, fast]) == ["Slower than fast, the fastest with 1,000 images/s, by more than 20%: slow (21%)."]
    assert not findings([near, fast])


@pytest.mark.parametrize("rate, recipe, speaks", [(0.49, "paper", True), (0.5, "paper", False), (0.1, "resident", False)])
def test_a_low_hit_rate_stands_out_where_it_costs_positives(rate, recipe, speaks):
    sentences = findings([run("a", config={"f2c_recipe": recipe}, entries=[{"f2c/pool_hit_rate": rate}])])
    assert bool(sentences) == speaks
    assert all("only 49% of the images find their identity in the pool" in each for each in sentences)
