"""Placement is a pure function: fleets in, decisions out."""

from dataclasses import replace
from typing import Any

import pytest

from hma_serve.core.cost_model import TransferCost
from hma_serve.core.worker import CodecSpec, KvCodecId, KvRopePairing, KvSupport, RopeSpec, WorkerRole, WorkerState
from hma_serve.kvblock import codec, describe_support
from hma_serve.router.fleet import Fleet, Load, Share, WorkerView
from hma_serve.router.pairing import compatible, difference, fallbacks
from hma_serve.router.placement import (
    LOCAL,
    RECOVERY_SECONDS,
    Demand,
    Placement,
    Reject,
    Why,
    place,
)
from hma_serve.router.prediction import STALE_SECONDS
from hma_serve.v1.kv_block_pb2 import KV_ROPE_PAIRING_HALF_SPLIT, KV_ROPE_PAIRING_INTERLEAVED, KvSemantics
from support.fake_workers import WINDOW, fake_worker

NOW = 1000.0
LONG = Demand(prompt_tokens=100, max_tokens=10)
SHORT = Demand(prompt_tokens=32, max_tokens=10)


def view(role: WorkerRole, instance: str, *, info: dict[str, Any] | None = None, **changes: Any) -> WorkerView:
    worker = fake_worker(role, instance=instance, **(info or {}))
    return replace(WorkerView(worker, load=Load(), load_at=NOW), **changes)


def prefill(instance: str = "p1", **changes: Any) -> WorkerView:
    return view(WorkerRole.PREFILL, instance, **changes)


def decode(instance: str = "d1", **changes: Any) -> WorkerView:
    return view(WorkerRole.DECODE, instance, **changes)


def chosen(outcome: Placement | Reject) -> tuple[str, str | None]:
    assert isinstance(outcome, Placement), outcome
    return outcome.decode.instance, outcome.prefill.instance if outcome.prefill else None


def refused(outcome: Placement | Reject) -> Why:
    assert isinstance(outcome, Reject), outcome
    return outcome.why


@pytest.mark.parametrize(("prompt", "packed"), [(1, 0), (32, 0), (33, 32), (64, 32), (65, 64), (100, 96)])
def test_only_whole_groups_go_to_prefill(prompt: int, packed: int) -> None:
    outcome = place(Demand(prompt, 1), Fleet((prefill(),), (decode(),)), NOW)
    assert isinstance(outcome, Placement)
    assert outcome.packed_tokens == packed
    assert (outcome.prefill is None) == (packed == 0)


def test_the_least_loaded_pair_is_taken() -> None:
    fleet = Fleet(
        prefills=(prefill("p1", load=Load(queued_tokens=900)), prefill("p2", load=Load(queued_tokens=100))),
        decodes=(decode("d1", load=Load(running=2)), decode("d2", load=Load(running=1))),
    )
    assert chosen(place(LONG, fleet, NOW)) == ("d2", "p2")


def test_what_this_router_placed_since_the_report_counts() -> None:
    fleet = Fleet(
        prefills=(prefill("p1", unseen=Share(1, 64)), prefill("p2")),
        decodes=(decode("d1"), decode("d2", unseen=Share(1, 100))),
    )
    assert chosen(place(LONG, fleet, NOW)) == ("d1", "p2")


def test_what_this_router_has_there_is_a_lower_bound() -> None:
    fleet = Fleet(decodes=(decode("d1", ours=Share(3, 300)), decode("d2", load=Load(running=2))))
    assert chosen(place(SHORT, fleet, NOW)) == ("d2", None)


def test_memory_counts_as_much_as_slots() -> None:
    nearly_full = decode("d1", load=Load(running=1, kv_used_tokens=900, kv_capacity_tokens=1000, kv_free_tokens=100))
    busier = decode("d2", load=Load(running=4, kv_used_tokens=100, kv_capacity_tokens=1000, kv_free_tokens=900))
    assert chosen(place(SHORT, Fleet(decodes=(nearly_full, busier)), NOW)) == ("d2", None)


def test_ties_go_to_the_one_used_less() -> None:
    fleet = Fleet((prefill("p1", placed=1), prefill("p2")), (decode("d1", placed=1), decode("d2")))
    assert chosen(place(LONG, fleet, NOW)) == ("d2", "p2")


@pytest.mark.parametrize(
    "difference",
    [
        {"codecs": (KvCodecId.TT_BFP8_B,)},
        {"fingerprint": "0" * 64},
        {"codecs": ()},
        {"codecs": (KvCodecId.F32, KvCodecId.TT_BFP8_B)},
    ],
)
def test_an_incompatible_prefill_is_never_paired(difference: dict[str, Any]) -> None:
    fleet = Fleet((prefill("odd", info=difference), prefill("busy", load=Load(queued_tokens=10_000))), (decode(),))
    assert chosen(place(LONG, fleet, NOW)) == ("d1", "busy")


def test_rope_must_agree_too() -> None:
    one, other = fake_worker(WorkerRole.PREFILL), fake_worker(WorkerRole.DECODE)
    assert compatible(one, other)
    turned = replace(other.model, rope=RopeSpec(KvRopePairing.INTERLEAVED, 1e4))
    assert not compatible(one, replace(other, model=turned))


def test_another_pairing_is_no_hindrance_to_a_decode_that_reads_it() -> None:
    one, other = fake_worker(WorkerRole.PREFILL), fake_worker(WorkerRole.DECODE)
    turned = replace(one, model=replace(one.model, rope=replace(one.model.rope, pairing=KvRopePairing.INTERLEAVED)))
    assert not compatible(turned, other)
    both = replace(other, rope_pairings=(KvRopePairing.INTERLEAVED,))
    assert compatible(turned, both)
    assert compatible(one, both)
    theta = replace(turned, model=replace(turned.model, rope=replace(turned.model.rope, theta=7.0)))
    assert not compatible(theta, both)


def test_k_offsets_must_agree_too() -> None:
    one, other = fake_worker(WorkerRole.PREFILL), fake_worker(WorkerRole.DECODE)
    offset = replace(one, model=replace(one.model, kv_fingerprint="0f" * 32))
    assert not compatible(offset, other)
    assert compatible(offset, replace(other, model=replace(other.model, kv_fingerprint="0f" * 32)))
    assert not compatible(offset, replace(other, model=replace(other.model, kv_fingerprint="1f" * 32)))


@pytest.mark.parametrize(
    ("model", "codecs", "named"),
    [
        ({"fingerprint": "0" * 64}, None, "model fingerprint"),
        ({"kv_fingerprint": "0" * 64}, None, "K offsets"),
        ({"rope": RopeSpec(KvRopePairing.INTERLEAVED, 1e4)}, None, "RoPE pairing"),
        ({}, (CodecSpec(KvCodecId.NVFP4),), "K codec nvfp4"),
        ({}, (), "K codec"),
    ],
)
def test_a_pair_that_cannot_be_says_what_it_differs_in(
    model: dict[str, Any], codecs: tuple[CodecSpec, ...] | None, named: str
) -> None:
    odd = prefill("odd")
    info = replace(odd.info, model=replace(odd.info.model, **model))
    info = info if codecs is None else replace(info, codecs=codecs)
    outcome = place(LONG, Fleet((replace(odd, info=info),), (decode(),)), NOW, local_prefill=False)
    assert isinstance(outcome, Reject)
    assert outcome.message.endswith(f": they differ in their {named}")


def stating(view: WorkerView, *codecs: str, **semantics: Any) -> WorkerView:
    """With a record that states what KV it sends or reads."""
    stated: dict[str, Any] = {"model_fingerprint": "f" * 64, "layers": 1, "rope_theta": 1e4}
    meaning = KvSemantics(**(stated | semantics))
    listed = [codec(name) for name in codecs]
    pairings = [KV_ROPE_PAIRING_HALF_SPLIT]
    said = describe_support(meaning, k_codecs=listed, v_codecs=listed, rope_pairings=pairings)
    return replace(view, info=replace(view.info, kv=KvSupport.from_proto(said)))


def test_bf16_is_the_fallback_of_a_prefill_that_can_send_it() -> None:
    reads = stating(decode(), "f32")  # and BF16, as all do
    both, native = (stating(prefill(), *names).info for names in (("tt_bfp8_b", "bf16"), ("tt_bfp8_b",)))
    assert difference(both, reads.info) is None
    assert fallbacks(both, reads.info) == 2
    assert difference(native, reads.info) == "K codec tt_bfp8_b"
    assert fallbacks(both, stating(decode(), "int4", "tt_bfp8_b").info) == 0


def test_an_older_decode_gets_no_fallback_and_is_paired_by_what_its_record_lists() -> None:
    old = decode(info={"codecs": (KvCodecId.F32, KvCodecId.BF16)}).info
    sender = stating(prefill(info={"codecs": (KvCodecId.TT_BFP8_B,)}), "tt_bfp8_b", "bf16").info
    assert difference(sender, old) == "K codec tt_bfp8_b"
    assert compatible(replace(sender, codecs=(CodecSpec(KvCodecId.F32),)), old)


@pytest.mark.parametrize(
    ("semantics", "fields", "named"),
    [
        ({"qk_norm": True}, {}, "semantics.qk_norm"),
        ({"rotation_id": 3}, {}, "semantics.rotation_id"),
        ({}, {"page_tokens": [64]}, "page sizes"),
        ({}, {"rope_pairings": [KV_ROPE_PAIRING_INTERLEAVED]}, "RoPE pairing"),
    ],
)
def test_the_field_that_keeps_a_stated_pair_apart_is_named(
    semantics: dict[str, Any], fields: dict[str, list[int]], named: str
) -> None:
    odd, reads = stating(prefill(), "bf16", **semantics), stating(decode(), "bf16")
    assert odd.info.kv is not None
    said = odd.info.kv.to_proto()
    for name, values in fields.items():
        del getattr(said, name)[:]
        getattr(said, name).extend(values)
    odd = replace(odd, info=replace(odd.info, kv=KvSupport.from_proto(said)))
    outcome = place(LONG, Fleet((odd,), (reads,)), NOW, local_prefill=False)
    assert isinstance(outcome, Reject)
    assert outcome.message.endswith(f": they differ in their {named}")


def test_a_native_pair_is_preferred_until_its_decode_is_much_fuller() -> None:
    sender = stating(prefill(), "tt_bfp8_b", "bf16")

    def taken(running: int) -> str:
        native = stating(decode("native", placed=1, load=Load(running=running)), "tt_bfp8_b")
        return chosen(place(LONG, Fleet((sender,), (stating(decode("bf16"), "f32"), native)), NOW))[0]

    assert [taken(running) for running in (0, 1, 3)] == ["native", "native", "bf16"]


def test_bytes_on_the_wire_enter_the_prediction() -> None:
    transfer = TransferCost(bytes_per_token=34, bytes_per_second=1000.0, layers=1)
    sender = stating(prefill(load=Load(transfer=transfer)), "tt_bfp8_b", "bf16")

    def ttft(codec: str) -> float:
        outcome = place(LONG, Fleet((sender,), (stating(decode(), codec),)), NOW)
        assert isinstance(outcome, Placement)
        return outcome.prediction.ttft

    # The fake model has one layer with one head of 16 channels: 64 bytes a token as BF16.
    assert ttft("tt_bfp8_b") == pytest.approx(96 * 34 / 1000)
    assert ttft("f32") == pytest.approx(96 * 64 / 1000)


def test_a_busier_decode_is_taken_when_only_it_has_a_partner() -> None:
    both = (KvCodecId.F32, KvCodecId.BF16)
    fleet = Fleet(
        prefills=(prefill("bf16", info={"codecs": (KvCodecId.BF16,)}),),
        decodes=(decode("idle"), decode("partner", info={"codecs": both}, load=Load(running=5))),
    )
    assert chosen(place(LONG, fleet, NOW)) == ("partner", "bf16")


def test_no_prefill_worker_means_that_decode_computes_all() -> None:
    outcome = place(LONG, Fleet(decodes=(decode(),)), NOW)
    assert chosen(outcome) == ("d1", None)
    assert isinstance(outcome, Placement)
    assert outcome.packed_tokens == 0
    assert refused(place(LONG, Fleet(decodes=(decode(),)), NOW, local_prefill=False)) is Why.NOBODY
    assert chosen(place(SHORT, Fleet(decodes=(decode(),)), NOW, local_prefill=False)) == ("d1", None)


def test_a_full_prefill_pool_makes_long_prompts_wait_and_short_ones_not() -> None:
    fleet = Fleet((prefill(load=Load(running=8)),), (decode(),))
    assert refused(place(LONG, fleet, NOW)) is Why.BUSY
    assert chosen(place(SHORT, fleet, NOW)) == ("d1", None)


@pytest.mark.parametrize(
    "state",
    [
        {"load": Load(running=7, waiting=1)},
        {"ours": Share(8, 8)},
        {"refused": True},
        {"load": Load(running=1, kv_capacity_tokens=1000, kv_free_tokens=50)},
        {"load": None, "away_since": NOW},
        {"away_since": NOW - RECOVERY_SECONDS + 1},
    ],
)
def test_a_full_or_briefly_absent_decode_is_worth_waiting_for(state: dict[str, Any]) -> None:
    assert refused(place(LONG, Fleet((prefill(),), (decode(**state),)), NOW)) is Why.BUSY


@pytest.mark.parametrize(
    "state",
    [
        {"away_since": NOW - RECOVERY_SECONDS},
        {"load": Load(draining=True)},
        {"info": {"state": WorkerState.DRAINING}},
        {"info": {"state": WorkerState.UNSPECIFIED}},
    ],
)
def test_a_gone_or_draining_decode_is_nobody(state: dict[str, Any]) -> None:
    assert refused(place(SHORT, Fleet(decodes=(decode(**state),)), NOW)) is Why.NOBODY


FULL, BF16_ONLY = prefill(refused=True), prefill("p2", info={"codecs": (KvCodecId.BF16,)})


@pytest.mark.parametrize(
    ("demand", "prefills", "full", "waits_for"),
    [
        (SHORT, (FULL,), {"d1", "d2"}, {"d1", "d2"}),
        (LONG, (), {"d1", "d2"}, {"d1", "d2"}),
        (LONG, (prefill(),), {"d1", "d2"}, {"d1"}),
        (LONG, (FULL,), {"d1", "d2"}, set()),
        (LONG, (FULL,), set(), set()),
        (LONG, (FULL, BF16_ONLY), {"d2"}, {"d2"}),
        (replace(LONG, profile=LOCAL), (FULL,), {"d1", "d2"}, {"d1", "d2"}),
    ],
)
def test_who_waits_says_on_which_decode_workers_it_lacks_nothing_but_room(
    demand: Demand, prefills: tuple[WorkerView, ...], full: set[str], waits_for: set[str]
) -> None:
    decodes = (decode("d1"), decode("d2", info={"codecs": (KvCodecId.BF16,)}), decode("s", info={"max_model_len": 41}))
    outcome = place(demand, Fleet(prefills, decodes).without_room_on(full), NOW)
    assert refused(outcome) is Why.BUSY
    assert isinstance(outcome, Reject)
    assert outcome.waits_for == waits_for


def test_a_briefly_absent_prefill_is_waited_for_rather_than_replaced_by_decode() -> None:
    recent = Fleet((prefill(away_since=NOW - 1),), (decode(),))
    assert refused(place(LONG, recent, NOW)) is Why.BUSY
    gone = Fleet((prefill(away_since=NOW - RECOVERY_SECONDS),), (decode(),))
    assert chosen(place(LONG, gone, NOW)) == ("d1", None)


def test_memory_counts_for_all_that_a_request_may_need_or_overcommitted_for_what_it_has() -> None:
    nearly_full = decode(load=Load(running=1, kv_capacity_tokens=1000, kv_free_tokens=500))
    overcommitted = replace(nearly_full, info=fake_worker(WorkerRole.DECODE, instance="d1", overcommit=True))
    fits, grows = Demand(32, 448), Demand(32, 449)
    assert chosen(place(fits, Fleet(decodes=(nearly_full,)), NOW)) == ("d1", None)
    assert refused(place(grows, Fleet(decodes=(nearly_full,)), NOW)) is Why.BUSY
    assert chosen(place(grows, Fleet(decodes=(overcommitted,)), NOW)) == ("d1", None)
    moved = replace(grows, emitted_tokens=448)
    assert refused(place(moved, Fleet(decodes=(overcommitted,)), NOW)) is Why.BUSY


def test_memory_that_is_reported_counts_as_it_is_and_no_more() -> None:
    packed = decode(load=Load(running=1, kv_capacity_tokens=1000, kv_free_tokens=500), ours=Share(1, 900, 0.0, 960))
    assert chosen(place(SHORT, Fleet(decodes=(packed,)), NOW)) == ("d1", None)
    more = replace(packed, ours=Share(2, 1800, 0.0, 1920))
    assert refused(place(SHORT, Fleet(decodes=(more,)), NOW)) is Why.BUSY


def test_an_idle_decode_decides_for_itself_about_memory() -> None:
    full = decode(load=Load(kv_used_tokens=1000, kv_capacity_tokens=1000))
    assert chosen(place(SHORT, Fleet(decodes=(full,)), NOW)) == ("d1", None)


def test_a_request_that_no_window_takes_is_told_so() -> None:
    too_long = Demand(prompt_tokens=10, max_tokens=WINDOW)
    assert refused(place(too_long, Fleet(decodes=(decode(),)), NOW)) is Why.TOO_LONG
    small = decode(info={"kv_capacity_tokens": 40})
    assert refused(place(SHORT, Fleet(decodes=(small,)), NOW)) is Why.TOO_LONG


def test_a_larger_window_wins_over_a_lower_load() -> None:
    fleet = Fleet(decodes=(decode("small", info={"max_model_len": 41}), decode("large", load=Load(running=7))))
    assert chosen(place(SHORT, fleet, NOW)) == ("large", None)


SILENT = Load(running=1, engine_silent_seconds=STALE_SECONDS + 1)


@pytest.mark.parametrize("flaw", [{"load_at": NOW - STALE_SECONDS - 1}, {"load": SILENT}, {}])
def test_a_quiet_or_avoided_worker_is_the_last_choice_but_a_choice(flaw: dict[str, Any]) -> None:
    demand = replace(SHORT, avoid=frozenset({"d1"} if not flaw else ()))
    flawed = decode("d1", **flaw)
    assert chosen(place(demand, Fleet(decodes=(flawed, decode("d2", load=Load(running=7)))), NOW)) == ("d2", None)
    assert chosen(place(demand, Fleet(decodes=(flawed,)), NOW)) == ("d1", None)


def test_an_engine_may_be_silent_for_some_of_its_own_steps() -> None:
    slow = decode("d1", load=replace(SILENT, step_seconds=1.0))
    assert chosen(place(SHORT, Fleet(decodes=(slow, decode("d2", load=Load(running=7)))), NOW)) == ("d1", None)


def test_an_empty_fleet_is_nobody() -> None:
    assert refused(place(SHORT, Fleet(), NOW)) is Why.NOBODY
