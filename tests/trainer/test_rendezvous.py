"""The process group of a training: its end."""

import weakref

from torch import distributed

from f2c_plugin.trainer.rendezvous import process_group


def test_a_group_outlives_its_training_until_the_next_so_that_ddp_never_ends_its_threads():
    with process_group():
        first = weakref.ref(distributed.group.WORLD)
    assert first() is not None
    with process_group():
        assert first() is None and distributed.group.WORLD is not None
