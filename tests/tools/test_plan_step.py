"""Memory of whole steps against what a benchmark measured, and what the plan says of it."""

import json

import pytest

from f2c_plugin.cli import main as cli
from f2c_plugin.errors import ConfigError
from f2c_plugin.tools import plan_step
from f2c_plugin.tools.net_costs import CostsByBatch, count
from f2c_plugin.tools.plan import Plan
from f2c_plugin.tools.plan_step import BESIDE, StepPlan, memory, parts
from tests.tools.test_plan_time import costs_of, measured


def test_memory_is_what_was_measured():
    """The benchmark's peak is above the net's parameters, and holds 20 batches of images."""
    ratios = {}
    for _, plan, head, _, peak_mb in measured("steps"):
        net = costs_of(plan)(plan.batch_size)
        planned = memory(plan, costs_of(plan), head) - BESIDE - net.parameters + (20 - 2) * net.images
        ratios[plan.network, head] = planned / (peak_mb * 2**20)
    assert len(ratios) == 8 and min(ratios.values()) > 0.98 and max(ratios.values()) < 1.005


def test_several_gpus_keep_gradients_twice():
    alone, together = Plan(10**6, 1, "small"), Plan(10**6, 2, "small")
    net = costs_of(alone)(alone.batch_size)
    assert memory(together, costs_of(together), "backbone") - memory(alone, costs_of(alone), "backbone") == net.gradients
    assert parts(together, net)["DDP's buckets"] == (net.gradients, "counted")


def test_what_a_head_holds_while_activations_live_counts_and_not_its_optimizer_step():
    plan = Plan(10**6, 1, "r18")
    net, matrix = costs_of(plan), 4 * 512 * 10**6
    at_backward, at_optimizer = plan.partial_fc_moments(0.1)
    assert at_backward == pytest.approx(3.1 * matrix) and at_optimizer == pytest.approx(4.1 * matrix)
    assert memory(plan, net, "partial_fc") - memory(plan, net, "backbone") == at_backward
    small = Plan(10**6, 1, "small")  # activations are less than a matrix
    net = costs_of(small)
    assert (memory(small, net, "partial_fc") - memory(small, net, "backbone")
            == at_optimizer + 2 * net(128).gradients - net(128).peak)


def test_the_probe_net_of_dcq_sees_half_of_the_batch():
    plan = Plan(10**6, 1, "r18")
    net = costs_of(plan)
    taken = memory(plan, net, "dcq") - memory(plan, net, "backbone")
    assert taken == plan.dcq() + net(128).parameters + net(64).peak - net(128).peak < 0


def test_costs_grow_evenly_with_the_batch():
    for network in "mbf", "r18", "vit_t":
        costs = CostsByBatch(network, 512, 64, True)
        for batch_size in 32, 64, 96, 256:
            expected, found = (vars(each) for each in (count(network, 512, batch_size, True), costs(batch_size)))
            assert found == pytest.approx(expected, rel=0.02), (network, batch_size)


def test_the_largest_batch_just_fits():
    network = "small"
    planned = StepPlan(Plan(10**6, 1, network), 10)
    for step in planned.steps:
        if not step.largest_batch:
            assert step.head == "full_fc" and not step.fits
            continue
        just, more = (Plan(10**6, 1, network, step.largest_batch + add) for add in (0, 2))
        sizes = [memory(each, costs_of(each), step.head) for each in (just, more)]
        assert sizes[0] <= planned.gpu_memory < sizes[1], step.head


def test_the_verdict_says_which_heads_fit_and_which_is_fastest():
    assert StepPlan(Plan(10**5, 8, "r100"), 24).verdict() == (
        "All heads fit 24 GB; of those that learn from every image F²C and Partial FC are about equally fast, full FC takes "
        "1.1 times as long, F²C as published takes 1.3 times as long; DCQ, which learns from half of them, takes 0.7 times as "
        "long.")
    assert StepPlan(Plan(10**6, 1, "r18"), 10).verdict() == (
        "F²C, F²C as published and DCQ fit 10 GB; of those that learn from every image F²C is fastest, F²C as published takes "
        "1.3 times as long; DCQ, which learns from half of them, takes 0.7 times as long.")
    assert StepPlan(Plan(10**6, 1, "r18"), 4.6).verdict() == "DCQ fits 4.6 GB."
    few = StepPlan(Plan(10**6, 1, "r18"), 3)
    assert few.verdict() == f"No head fits 3 GB: lower the batch to {few.steps[1].largest_batch}, for F²C."
    assert StepPlan(Plan(10**6, 1, "r18"), 0.1).verdict() == "No head fits 0.1 GB: take a smaller network or larger GPUs."


def test_an_odd_batch_has_no_step_with_a_gallery_net():
    planned = StepPlan(Plan(10**5, 1, "small", 33), 24)
    assert [step.head for step in planned.steps] == ["backbone", "f2c", "partial_fc", "full_fc"]
    assert list(planned.refused) == ["f2c_paper", "dcq"] and all("--batch-size 33: " in why for why in planned.refused.values())
    assert planned.verdict().startswith("F²C, Partial FC and full FC fit 24 GB; F²C is fastest, ")
    assert "  DCQ               --batch-size 33: DCQ splits a batch into two halves: make it even" in planned.report()


def test_heads_without_a_pool_are_planned_where_the_pool_is_too_small():
    planned = StepPlan(Plan(1000, 8, "small"), 24)
    assert planned.refused["f2c"] == ("--pool-rate 0.1 gives 100 slots for --identities 1000, but a gathered batch holds up to "
                                      "1000 identities: raise it to at least 1")
    assert planned.plan.verdict() == f"No pool of F²C: {planned.refused['f2c']}."
    assert [name.split(",")[0] for name, *_ in planned.plan.table()] == [
        "DCQ", "  gallery net (small)", "Partial FC", "full FC"]
    largest = {step.head: step.largest_batch for step in StepPlan(Plan(10**4, 1, "small", 128, 0.1), 24).steps}
    assert largest["f2c"] == 1000 and largest["f2c_paper"] == 2000  # slots; the others have what memory takes
    assert largest["full_fc"] > 3000 and largest["backbone"] > 3000 and largest["dcq"] > 3000


def test_the_curve_of_a_head_begins_where_it_can_have_the_training(tmp_path, monkeypatch):
    drawn = {}

    def kept(figure, path):
        for axis in figure.axes:
            drawn[axis.get_ylabel()] = {line.get_label(): len(line.get_xdata()) for line in axis.lines}
    monkeypatch.setattr(plan_step, "save_figure", kept)
    plan_step.draw(StepPlan(Plan(9000, 1, "small"), 24), tmp_path / "plan.png")
    for curves in drawn.values():
        assert 10 < curves["F²C"] < 21 == curves["F²C as published"] == curves["full FC"] == curves["DCQ"]
    assert list(drawn) == ["GB of each GPU", "ms a step on an H200"]


def test_what_no_gpu_has_is_refused():
    for size in 0, -1, float("nan"), float("inf"):
        with pytest.raises(ConfigError, match=f"--gpu-memory {size:g}: must be from 0.01 to 10,000 GB"):
            StepPlan(Plan(10**5, 1, "small"), size)
    with pytest.raises(ConfigError) as found:
        Plan(10**20, 0, "small", 0, 2.0, "int8")
    assert str(found.value).splitlines() == [
        "--identities 100000000000000000000: must be from 1 to 10,000,000,000", "--gpus 0: must be from 1 to 1,000,000",
        "--batch-size 0: must be from 1 to 1,000,000", "--pool-rate 2.0: must be above 0, up to 1",
        "--pool-dtype 'int8': must be one of 'float32', 'bfloat16', 'float16'"]


def test_smaller_embeddings_take_less():
    half, whole = (Plan(10**6, 1, "small", embedding_size=size) for size in (256, 512))
    assert half.pool() - 4 * half.slots == (whole.pool() - 4 * whole.slots) / 2
    assert half.kept_weights() == whole.kept_weights() / 2 and half.partial_fc(0.1) < whole.partial_fc(0.1)
    assert half.dcq() < whole.dcq() and half.f2c() < whole.f2c()
    assert StepPlan(half, 24).costs.flops < StepPlan(whole, 24).costs.flops


def test_the_command_prints_the_steps_in_words_and_in_json(tmp_path, capsys):
    arguments = ["plan", "--identities", "100000", "--gpus", "1", "--network", "small", "--no-fp16", "--gpu-memory", "16"]
    cli(arguments)
    lines = capsys.readouterr().out.splitlines()
    planned = StepPlan(Plan(100_000, 1, "small", fp16=False), 16)
    assert "a whole step of small, float32, without a head" in lines
    assert not any("DDP" in line for line in lines)
    assert lines[-2] == planned.verdict() and lines[-1] == planned.plan.verdict()
    cli([*arguments, "--json", "--plot", str(tmp_path / "plan.png")])
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(planned.summary()))
    assert found["without_head"]["activations and gradients"] == {"value": planned.costs.peak, "source": "counted"}
    assert found["head"]["slot table"]["source"] == "counted" and not found["fp16"]
    assert [step["head"] for step in found["steps"]] == ["backbone", "f2c", "f2c_paper", "dcq", "partial_fc", "full_fc"]
    assert {step["milliseconds"]["source"] for step in found["steps"]} == {"estimated"}
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
