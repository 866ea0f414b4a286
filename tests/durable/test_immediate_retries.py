"""Tests of immediate retries of stored tasks, which wait for no reaper."""

from __future__ import annotations

from kser.retry import Retry
from kser.status import SUCCESS
from tests.consumer.harness import Act
from tests.durable.harness import BOTH_WAYS, Sale, Shop, bare


@BOTH_WAYS
def test_immediate_retry_is_sent_by_the_attempt_before_it(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 27"""
    Act.acts["1.b"] = [Retry.later(0)]
    bare(cls)
    shop.first.handle()
    assert (Act.seen, shop.status()) == (["1.a", "1.b", "1.b", "1.c"], SUCCESS)
