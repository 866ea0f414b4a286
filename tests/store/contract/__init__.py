"""The contract that each store fulfils."""

from __future__ import annotations

from tests.store.contract.checkpoint import CheckpointContract
from tests.store.contract.find import FindContract
from tests.store.contract.lifecycle import LifecycleContract
from tests.store.contract.reaper import ReaperContract
from tests.store.contract.save_and_claim import SaveAndClaimContract
from tests.store.contract.takeover import TakeoverContract


class StoreContract(
    SaveAndClaimContract, CheckpointContract, ReaperContract, TakeoverContract, LifecycleContract, FindContract
):
    """The whole store contract."""
