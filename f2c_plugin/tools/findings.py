"""Says in sentences what stands out in trainings: rules from their figures to text."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from f2c_plugin.evaluation.accuracy import FOLDS, fold_accuracies
from f2c_plugin.tools.runs import Run, beside, differing_settings, scores_of

SLOW = 0.8  # of the fastest run's images per second
LOW_HIT_RATE = 0.5
SAME_LENGTH = 0.99  # runs whose numbers of images differ by less can be compared
SKIPPED_BY_FP16 = 0.05  # of the steps: its scaler finds its scale by steps that overflow
STANDARD_ERRORS = 2  # a difference that is larger is more than chance
COLLAPSED = 0.99  # mean cosine of different people: their embeddings are all but the same
DATA = ("rec", "num_classes", "num_image")

Rule = Callable[[Sequence[Run]], Iterator[str]]


def findings(runs: Sequence[Run]) -> list[str]:
    """What stands out, a sentence each; first what makes a comparison unfair."""
    return [sentence for rule in RULES for sentence in rule(runs)]


def _different_lengths(runs: Sequence[Run]) -> Iterator[str]:
    by_length = sorted(runs, key=lambda run: run.images_seen)
    least, most = by_length[0], by_length[-1]
    if least.images_seen < SAME_LENGTH * most.images_seen:
        yield (f"The runs have seen different numbers of images, from {least.images_seen:,.0f} ({least.name}) to "
               f"{most.images_seen:,.0f} ({most.name}): compare their curves at the same number, not their last figures.")


def _different_data(runs: Sequence[Run]) -> Iterator[str]:
    if keys := [key for key in differing_settings(runs) if key in DATA]:
        yield f"The runs differ in their data ({', '.join(keys)}): a difference may come from that."


def _different_seeds(runs: Sequence[Run]) -> Iterator[str]:
    keys = differing_settings(runs)
    if keys == ["seed"]:
        yield "The runs differ in nothing but the seed: the spread of their figures is chance."
    elif "seed" in keys:
        yield "The runs do not share one seed, so a part of every difference is chance."


def _unfinished(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        planned = _planned_images(run)
        # The last steps may be fewer than those between two entries of the history.
        slack = int(run.config.get("frequent", "10")) * _images_per_step(run)
        if planned and run.images_seen <= planned - slack:
            yield (f"{run.name} has seen {run.images_seen:,.0f} of its {planned:,.0f} images: it has stopped early, or is not "
                   "at its end yet.")


def _images_per_step(run: Run) -> float:
    return run.images_seen / max(run.history[-1]["step"], 1)


def _planned_images(run: Run) -> float | None:
    """As arcface_torch counts them; None if the config is not recorded."""
    numbers = [run.config.get(key, "") for key in ("num_image", "num_epoch")]
    if not all(number.isdecimal() for number in numbers) or not run.config.get("frequent", "10").isdecimal():
        return None
    num_image, num_epoch = map(int, numbers)
    return num_image // _images_per_step(run) * num_epoch * _images_per_step(run)


def _not_finite(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        found: list[str] = []
        if steps := run.not_finite_losses:
            found.append(f"its loss was not finite at step {steps[0]:,}"
                         + (f" and at {len(steps) - 1} later entries of the log" if len(steps) > 1 else ""))
        expected = SKIPPED_BY_FP16 * run.history[-1]["step"] if run.config.get("fp16") == "True" else 0
        if run.skipped_steps > expected:
            found.append(f"{run.skipped_steps:,} of its {run.history[-1]['step']:,} steps were skipped because their gradient "
                         "was not finite")
        if features := sum(value for _, value in run.series("f2c/not_finite")):
            found.append(f"{features:,.0f} features were not finite and stayed out of its pool")
        if found:
            yield f"{run.name} has met numbers that are not finite: {'; '.join(found)}."


def _batch_not_logged(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        if run.derived_batch == 1:
            yield (f"{run.name}: its log holds no total_batch_size, nor two speeds from which it could be found: its steps are "
                   "counted as images, and its hours are wrong.")
        elif run.derived_batch:
            yield (f"{run.name}: its log holds no total_batch_size; by its speeds and times a step has {run.derived_batch:,} "
                   "images.")


def _never_verified(runs: Sequence[Run]) -> Iterator[str]:
    if never := [run for run in runs if not run.accuracies]:
        yield (f"{_names(never)} {'was' if len(never) == 1 else 'were'} never verified, so that nothing shows what was learnt: "
               "name sets in val_targets, or give the model.pt to `f2c-plugin evaluate`.")


def _collapsed(runs: Sequence[Run]) -> Iterator[str]:
    for accuracy in _accuracies(runs):
        for run in runs:
            divergence = run.last(beside(accuracy, "divergence"))
            if divergence is not None and divergence >= COLLAPSED:
                yield (f"{scores_of(accuracy)}: {run.name} has collapsed: its embeddings of different people have a cosine of "
                       f"{divergence:.3f} in the mean, so that all faces look the same to it. Train again with a smaller lr.")


def _no_better_than_chance(runs: Sequence[Run]) -> Iterator[str]:
    for accuracy in _accuracies(runs):
        for run in runs:
            if (value := run.last(accuracy)) is None:
                continue
            name, (chance, error) = scores_of(accuracy), _chance(run, accuracy)
            if value <= chance + STANDARD_ERRORS * error:
                resolved = (f", within {STANDARD_ERRORS} standard errors of chance ({chance:.2%} ± {error:.2%})" if error else
                            f", and chance is {chance:.2%}")
                yield (f"{name}: {run.name} has learnt nothing that shows: its last accuracy is {value:.2%}{resolved}.")


def _chance(run: Run, accuracy: str) -> tuple[float, float]:
    """The accuracy of a net that has learnt nothing, and its standard error: by the number of pairs if the scores are recorded,
    otherwise by the logged deviation of the folds; 0 without either."""
    if scores := run.scores.get(scores_of(accuracy)):
        same = float(scores[1].mean())
        chance = max(same, 1 - same)
        return chance, (chance * (1 - chance) / len(scores[1])) ** 0.5
    return 0.5, (run.last(f"{accuracy}_std") or 0.0) / (FOLDS - 1) ** 0.5


def _accuracies(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.accuracies))


def _best(runs: Sequence[Run]) -> Iterator[str]:
    for accuracy in _accuracies(runs):
        ranked = sorted((run for run in runs if run.last(accuracy) is not None), key=lambda run: -_value(run, accuracy))
        if len(ranked) < 2:
            continue
        name, (leader, second, *_) = scores_of(accuracy), ranked
        answers = {run.scores[name][1].tobytes() for run in ranked if name in run.scores}
        if len(answers) > 1:
            yield f"{name}: the runs were verified on different pairs, so their accuracies are not compared."
            continue
        best = f"{name}: {leader.name} is best with {_value(leader, accuracy):.2%} in the last verification"
        errors = {run.name: _standard_error(leader, run, accuracy) for run in ranked[1:]}
        close = [run for run in ranked[1:] if (error := errors[run.name]) is not None
                 and _ahead(leader, run, accuracy) <= STANDARD_ERRORS * error]
        ahead = f"{100 * _ahead(leader, second, accuracy):.2f} points ahead of {second.name}"
        if close:
            yield (f"{best}, but its lead over {_names(close)} is within {STANDARD_ERRORS} standard errors of the difference "
                   "and may be chance.")
        elif (error := errors[second.name]) is None:
            yield f"{best}, {ahead}; whether that is chance is not recorded."
        else:
            yield f"{best}, {ahead}: {100 * error:.2f} points are one standard error of the difference."


def _value(run: Run, accuracy: str) -> float:
    value = run.last(accuracy)
    assert value is not None
    return value


def _ahead(leader: Run, other: Run, accuracy: str) -> float:
    return _value(leader, accuracy) - _value(other, accuracy)


def _standard_error(first: Run, second: Run, accuracy: str) -> float | None:
    """Of the difference of two last accuracies, by the folds: paired if the scores are recorded, otherwise from the logged
    standard deviations, or None without either."""
    scores = [run.scores.get(scores_of(accuracy)) for run in (first, second)]
    if all(scores):
        difference = np.subtract(*(fold_accuracies(*of_run) for of_run in scores if of_run))
        return float(difference.std(ddof=1) / len(difference) ** 0.5)
    deviations = [run.last(f"{accuracy}_std") for run in (first, second)]
    if None in deviations:
        return None
    return float(np.hypot(*np.array(deviations, float)) / (FOLDS - 1) ** 0.5)


def _slower(runs: Sequence[Run]) -> Iterator[str]:
    speeds = {run.name: run.speed for run in runs if run.speed}
    if not speeds:
        return
    fastest = max(speeds, key=lambda name: speeds[name])
    slow = {name: 1 - speed / speeds[fastest] for name, speed in speeds.items() if speed < SLOW * speeds[fastest]}
    if slow:
        yield (f"Slower than {fastest}, the fastest with {speeds[fastest]:,.0f} images/s, by more than {1 - SLOW:.0%}: "
               f"{', '.join(f'{name} ({share:.0%})' for name, share in slow.items())}.")


def _low_hit_rate(runs: Sequence[Run]) -> Iterator[str]:
    """Only as published: with class weights that learn, an identity outside the pool brings its weight along."""
    for run in runs:
        is_paper = run.config.get("f2c_recipe") == "paper" or any("gallery" in name for name in run.accuracies)
        rate = run.last("f2c/pool_hit_rate")
        if is_paper and rate is not None and rate < LOW_HIT_RATE:
            yield (f"{run.name}: only {rate:.0%} of the images find their identity in the pool; the others are only pushed off "
                   "their hardest negatives. Raise f2c_identity_rate or f2c_pool_rate.")


def _names(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs]
    if len(names) > 4:
        names[3:] = [f"{len(names) - 3} others"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


RULES: tuple[Rule, ...] = (_batch_not_logged, _different_lengths, _different_data, _different_seeds, _unfinished, _not_finite,
                           _never_verified, _collapsed, _no_better_than_chance, _best, _slower, _low_hit_rate)
