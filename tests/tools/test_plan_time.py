"""Times of the plan against those that benchmarks measured."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from f2c_plugin.tools import plan_time
from f2c_plugin.tools.net_costs import CostsByBatch
from f2c_plugin.tools.plan import Plan
from f2c_plugin.tools.plan_time import HEADS, MEASURED

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
LATEST = "gpu_nvidia_h200_d55bec5.json"


def measured(part):
    """(file, plan, head, milliseconds, peak MB) of all that the H200 measured."""
    for path in RESULTS.glob("gpu_nvidia_h200*.json"):
        for row in json.loads(path.read_text())["parts"].get(part, []):
            plan = Plan(row["identities"], row["ranks"], row["network"] or "r50", row["batch_size"],
                        row["slots"] / row["identities"], row["pool_dtype"], fp16=row["fp16"])
            for head in ("backbone", *HEADS):
                if f"{head}_ms" in row:
                    yield path.name, plan, head, row[f"{head}_ms"], row[f"{head}_peak_mb"]


@cache
def costs_of(plan):
    return CostsByBatch(plan.network, plan.embedding_size, plan.batch_size, plan.fp16)


def costs(plan):
    return costs_of(plan)(plan.batch_size)


def test_what_is_called_measured_is_the_latest_measurement():
    latest = [row for row in measured("steps") if row[0] == LATEST]
    assert {(plan.network, head): milliseconds for _, plan, head, milliseconds, _ in latest} == MEASURED
    for _, plan, head, milliseconds, _ in latest:
        assert plan_time.step(plan, head, costs(plan)) == (milliseconds, "measured")
        for other in (dict(gpus=2), dict(batch_size=64), dict(fp16=False), dict(identities=10**6 + 1), dict(pool_rate=0.2),
                      dict(pool_dtype="float32"), dict(network="r18"), dict(embedding_size=256)):
            changed = replace(plan, **other)
            assert plan_time.step(changed, head, costs(plan)).source == "estimated"


def test_estimates_are_as_far_from_what_was_measured_as_is_said():
    steps = [milliseconds / plan_time.estimate(plan, head, costs(plan)) for _, plan, head, milliseconds, _ in measured("steps")]
    # Before the published recipe was recorded as CUDA graphs, its time was that of launching its kernels.
    heads = [milliseconds / plan_time.head(plan, head) for name, plan, head, milliseconds, _ in measured("head")
             if head != "f2c_paper" or name == LATEST]
    assert (len(steps), len(heads)) == (11, 8)
    assert tuple(round(each(steps), 2) for each in (min, max)) == plan_time.RANGE_OF_STEPS
    assert tuple(round(each(heads), 2) for each in (min, max)) == plan_time.RANGE_OF_HEADS


def test_time_follows_what_a_gpu_has_to_do():
    plan = Plan(10**6, 8)
    for head in set(HEADS) - {"dcq"}:
        assert plan_time.head(replace(plan, identities=10**7), head) > plan_time.head(plan, head)
        assert plan_time.head(replace(plan, gpus=1), head) > plan_time.head(plan, head) or head == "f2c_paper"
    for head in HEADS:
        assert plan_time.head(replace(plan, embedding_size=256), head) < plan_time.head(plan, head)
    assert plan_time.head(replace(plan, shard_pool=True), "f2c_paper") < plan_time.head(plan, "f2c_paper")
    assert plan_time.head(replace(plan, pool_dtype="float16"), "f2c") < plan_time.head(plan, "f2c")
    assert plan_time.head(plan, "partial_fc") < plan_time.head(replace(plan, pool_rate=0.5), "partial_fc")
    assert plan_time.head(plan, "full_fc") == plan_time.head(replace(plan, pool_rate=0.5), "full_fc")
    net = costs(replace(plan, network="small"))
    published = [plan_time.estimate(each, "f2c_paper", net) - plan_time.head(each, "f2c_paper")
                 for each in (plan, replace(plan, fp16=False))]
    alone = [plan_time.estimate(each, "backbone", net) for each in (plan, replace(plan, fp16=False))]
    queue = plan_time.estimate(plan, "dcq", net) - plan_time.head(plan, "dcq")
    assert queue == pytest.approx(published[0] / 2)  # half of the images are gallery, the other half probes
    assert plan_time.head(replace(plan, queue_size=10**5), "dcq") > plan_time.head(plan, "dcq")
    assert plan_time.head(replace(plan, pool_dtype="float16"), "dcq") > plan_time.head(plan, "dcq")  # as it is copied
    assert published == pytest.approx([(1 + net.forward_flops / net.flops) * each for each in alone])
    assert alone[1] > alone[0]


def test_the_page_says_how_far_estimates_are_off():
    page = " ".join((RESULTS.parents[1] / "docs/config.md").read_text().split())
    for low, high in plan_time.RANGE_OF_STEPS, plan_time.RANGE_OF_HEADS:
        assert f"between {low} and {high}" in page
