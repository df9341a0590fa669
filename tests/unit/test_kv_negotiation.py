"""Pairing: meaning must be equal and is named when it is not, means are chosen, minor versions never break pairs."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest

from hma_serve import kvblock
from hma_serve.kvblock import errors
from hma_serve.v1.decode_pb2 import KvOffer
from hma_serve.v1.kv_block_pb2 import (
    KV_ROLE_K,
    KV_ROPE_PAIRING_HALF_SPLIT,
    KV_ROPE_PAIRING_INTERLEAVED,
    KV_ROUNDING_TRUNCATE,
    KvCodecSpec,
    KvManifest,
    KvSemantics,
    KvSupport,
)
from hma_serve.v1.kv_transfer_pb2 import PushHeader, PushRequest
from support.descriptors import baseline, message_classes
from support.kv_streams import (
    EPOCH,
    FINGERPRINT,
    GOLDEN,
    HEAD_DIM,
    HEADS,
    LAYERS,
    ROPE,
    TICKET,
    TOKEN_START,
    random_units,
    small_manifest,
    small_plan,
)

SEMANTICS = KvSemantics(
    model_fingerprint=FINGERPRINT, layers=LAYERS, kv_heads=HEADS, head_dim=HEAD_DIM, rope_theta=1e6, qk_norm=True
)


# A newer minor version, as a peer built from the next schema would write it: fields 90 and up are unknown here.
UNKNOWN = b"\xd2\x05\x05newer" + b"\xd8\x05\x2a"


def support(*codecs: str, semantics: KvSemantics = SEMANTICS, **fields: object) -> KvSupport:
    listed = [kvblock.codec(name) for name in codecs or ("tt_bfp8_b", "bf16")]
    pairings = [KV_ROPE_PAIRING_HALF_SPLIT]
    made = kvblock.describe_support(semantics, k_codecs=listed, v_codecs=listed, rope_pairings=pairings)
    for name, value in fields.items():
        if isinstance(value, list):
            del getattr(made, name)[:]
            getattr(made, name).extend(value)
        else:
            setattr(made, name, value)
    return made


def other(**fields: object) -> KvSemantics:
    made = KvSemantics.FromString(SEMANTICS.SerializeToString())
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_the_producers_order_decides() -> None:
    agreed = kvblock.negotiate(support("nvfp4", "tt_bfp8_b", "bf16"), support("f32", "bf16", "tt_bfp8_b"))
    assert agreed.k_codec == agreed.v_codec == kvblock.codec("tt_bfp8_b").spec()
    assert agreed.page_tokens == 32
    assert agreed.rope_pairing == KV_ROPE_PAIRING_HALF_SPLIT
    assert not agreed.k_offsets


def test_keys_and_values_are_chosen_apart() -> None:
    producer = support("tt_bfp8_b", v_codecs=[kvblock.codec("tt_bfp4_b").spec(), kvblock.codec("tt_bfp8_b").spec()])
    agreed = kvblock.negotiate(producer, support("tt_bfp8_b", "tt_bfp4_b"))
    assert (agreed.k_codec.id, agreed.v_codec.id) == (3, 4)


def test_bf16_is_the_fallback_that_every_receiver_reads() -> None:
    agreed = kvblock.negotiate(support("mxfp4", "bf16"), support("tt_bfp8_b"))
    assert agreed.k_codec == agreed.v_codec == kvblock.codec("bf16").spec()
    with pytest.raises(errors.Incompatible) as refused:
        kvblock.negotiate(support("mxfp4"), support("tt_bfp8_b"))
    assert refused.value.field == "k_codecs"


def test_granularity_and_codec_version_are_part_of_a_codec() -> None:
    with pytest.raises(errors.Incompatible):
        kvblock.negotiate(support("fp8_e4m3fn.tensor"), support("fp8_e4m3fn"))
    newer = kvblock.codec("tt_bfp8_b").spec()
    newer.version = 2
    both = support(k_codecs=[newer, kvblock.codec("tt_bfp8_b").spec()])
    assert kvblock.negotiate(both, support("tt_bfp8_b")).k_codec.version == 1
    assert kvblock.negotiate(support("tt_bfp8_b"), both).k_codec.version == 1


@pytest.mark.parametrize(
    ("semantics", "field"),
    [
        (other(model_fingerprint="00"), "semantics.model_fingerprint"),
        (other(layers=3), "semantics.layers"),
        (other(kv_heads=4), "semantics.kv_heads"),
        (other(head_dim=64), "semantics.head_dim"),
        (other(rope_theta=1e4), "semantics.rope_theta"),
        (other(rope_scaling_hash="s"), "semantics.rope_scaling_hash"),
        (other(qk_norm=False), "semantics.qk_norm"),
        (other(rotation_id=1), "semantics.rotation_id"),
    ],
)
def test_another_meaning_is_refused_by_name(semantics: KvSemantics, field: str) -> None:
    assert kvblock.semantic_hash(semantics) != kvblock.semantic_hash(SEMANTICS)
    for pair in ((support(semantics=semantics), support()), (support(), support(semantics=semantics))):
        with pytest.raises(errors.Incompatible) as refused:
            kvblock.negotiate(*pair)
        assert refused.value.field == field


@pytest.mark.parametrize("stated", ["", "0" * 64, kvblock.semantic_hash(other(layers=3)), "x" * 1000])
def test_a_hash_that_is_not_that_of_its_semantics_is_refused(stated: str) -> None:
    spoilt = support(semantic_hash=stated)
    for pair in ((spoilt, support()), (support(), spoilt), (spoilt, spoilt)):
        with pytest.raises(errors.Incompatible) as refused:
            kvblock.negotiate(*pair)
        assert refused.value.field == "semantic_hash"
        assert len(refused.value.message) < 400


def test_scheme_1_hashes_what_it_always_did() -> None:
    for case in json.loads((GOLDEN / "semantics" / "scheme1.json").read_text()):
        assert kvblock.semantic_hash(KvSemantics(**case["semantics"])) == case["sha256"]
        text = "hma-serve kv semantics 1\n" + "".join(f"{name}={value}\n" for name, value in case["hashed"])
        assert hashlib.sha256(text.encode()).hexdigest() == case["sha256"]


def test_fields_of_newer_minor_versions_change_neither_hash_nor_agreement() -> None:
    semantics = KvSemantics.FromString(SEMANTICS.SerializeToString() + UNKNOWN)
    assert kvblock.semantic_hash(semantics) == kvblock.semantic_hash(SEMANTICS)
    newer = KvSupport.FromString(support(semantics=semantics).SerializeToString() + UNKNOWN)
    newer.format_minor = kvblock.FORMAT_MINOR + 1
    agreed = kvblock.negotiate(support(), support())
    assert kvblock.negotiate(newer, support()) == kvblock.negotiate(support(), newer) == agreed


@pytest.mark.parametrize("pages", [[7], [0], [33], [7, 0, 48]])
def test_pages_that_are_not_whole_groups_are_never_chosen(pages: list[int]) -> None:
    with pytest.raises(errors.Incompatible) as refused:
        kvblock.negotiate(support(page_tokens=pages), support(page_tokens=pages))
    assert refused.value.field == "page_tokens"
    agreed = kvblock.negotiate(support(page_tokens=[*pages, 64]), support(page_tokens=[*pages, 64]))
    assert agreed.page_tokens == 64


def test_a_codec_or_an_order_that_is_nothing_is_never_chosen() -> None:
    nothing = KvCodecSpec()
    with pytest.raises(errors.Incompatible) as refused:
        kvblock.negotiate(support(k_codecs=[nothing, kvblock.codec("int8").spec()]), support(k_codecs=[nothing]))
    assert refused.value.field == "k_codecs"
    for pairings in ([], [0]):  # of a model that has RoPE
        with pytest.raises(errors.Incompatible) as refused:
            kvblock.negotiate(support(rope_pairings=pairings), support(rope_pairings=pairings))
        assert refused.value.field == "rope_pairings"
    none = support(semantics=other(rope_theta=0.0), rope_pairings=[])
    assert kvblock.negotiate(none, none).rope_pairing == 0


@pytest.mark.parametrize(
    ("producer", "receiver", "field"),
    [
        ({"page_tokens": [256]}, {}, "page_tokens"),
        ({"rope_pairings": [KV_ROPE_PAIRING_INTERLEAVED]}, {}, "rope_pairings"),
        ({"rope_pairings": []}, {}, "rope_pairings"),
        ({"k_offsets": True}, {}, "k_offsets"),
        ({"v_codecs": []}, {}, "v_codecs"),
    ],
)
def test_lists_without_a_common_entry_are_refused_by_name(
    producer: dict[str, object], receiver: dict[str, object], field: str
) -> None:
    with pytest.raises(errors.Incompatible) as refused:
        kvblock.negotiate(support(**producer), support(**receiver))  # type: ignore[arg-type]
    assert refused.value.field == field


def test_pages_orders_and_offsets_are_chosen() -> None:
    producer = support(page_tokens=[128, 64], rope_pairings=[KV_ROPE_PAIRING_INTERLEAVED], k_offsets=True)
    receiver = support(
        page_tokens=[32, 64], rope_pairings=[KV_ROPE_PAIRING_HALF_SPLIT, KV_ROPE_PAIRING_INTERLEAVED], k_offsets=True
    )
    agreed = kvblock.negotiate(producer, receiver)
    assert (agreed.page_tokens, agreed.rope_pairing, agreed.k_offsets) == (64, KV_ROPE_PAIRING_INTERLEAVED, True)


def test_extensions_must_be_understood_and_majors_equal() -> None:
    with pytest.raises(errors.UnknownCriticalExtension):
        kvblock.negotiate(support(extensions=[5]), support())
    assert kvblock.negotiate(support(extensions=[5]), support(extensions=[5])).page_tokens == 32
    with pytest.raises(errors.UnsupportedVersion):
        kvblock.negotiate(support(format_major=2), support())


def test_software_and_minor_versions_never_matter() -> None:
    producer = support(format_minor=9)
    producer.k_codecs[0].rounding = KV_ROUNDING_TRUNCATE
    assert kvblock.negotiate(producer, support(format_minor=0)).k_codec.id == 3


def test_a_newer_meaning_that_cannot_be_named_is_refused() -> None:
    with pytest.raises(errors.Incompatible) as refused:
        kvblock.negotiate(support(semantic_hash="of fields that are not known here"), support())
    assert refused.value.field == "semantic_hash"


def test_the_hash_is_pinned() -> None:
    assert kvblock.semantic_hash(SEMANTICS) == "24994941701c0118ffa74cfd59464d59438d42f9343938725f91768af87e5ba8"


def test_offers_carry_the_meaning_so_that_wrong_pairs_hold_no_pages() -> None:
    accepts = kvblock.Acceptance(
        FINGERPRINT, LAYERS, HEADS, HEAD_DIM, (kvblock.codec("tt_bfp8_b"),), ROPE, qk_norm=True
    )
    spec = kvblock.codec("tt_bfp8_b").spec()
    offer = KvOffer(model_fingerprint=FINGERPRINT, k_codec=spec, v_codec=spec, rope=ROPE, semantics=SEMANTICS)
    assert accepts.semantics == SEMANTICS
    kvblock.check_offer(offer, accepts)
    for wrong, field in ((other(qk_norm=False), "semantics.qk_norm"), (other(kv_heads=8), "semantics.kv_heads")):
        offer.semantics.CopyFrom(wrong)
        with pytest.raises(errors.Incompatible) as refused:
            kvblock.check_offer(offer, accepts)
        assert refused.value.field == field
    offer.semantics.CopyFrom(SEMANTICS)
    offer.k_offsets = True
    with pytest.raises(errors.Incompatible) as refused:
        kvblock.check_offer(offer, accepts)
    assert refused.value.field == "k_offsets"
    kvblock.check_offer(offer, dataclasses.replace(accepts, k_offsets=True))


def test_a_newer_producer_is_read() -> None:
    manifest = KvManifest.FromString(small_manifest().SerializeToString() + UNKNOWN)
    manifest.format_minor = kvblock.FORMAT_MINOR + 3
    plan = kvblock.validate_manifest(KvManifest.FromString(manifest.SerializeToString()))
    [frame] = kvblock.StreamWriter(plan, TICKET, EPOCH).frames(
        1, KV_ROLE_K, random_units(plan), token_start=TOKEN_START
    )
    header, payload = kvblock.decode_frame(frame)
    block = type(header.block).FromString(header.block.SerializeToString() + UNKNOWN)
    newer = kvblock.encode_frame(PushHeader(block=block), payload)
    assert len(newer) > len(frame)
    read, payload = kvblock.decode_frame(newer)
    assert kvblock.StreamReader(plan, TICKET, EPOCH).validate(read.block, payload).layer == 1


def test_a_critical_extension_of_a_newer_producer_is_refused() -> None:
    manifest = small_manifest()
    manifest.critical_extensions.append(7)
    with pytest.raises(errors.UnknownCriticalExtension):
        kvblock.validate_manifest(manifest)


def test_what_this_version_writes_is_read_by_the_first_version() -> None:
    older = message_classes(baseline("v1.0"))
    manifest = small_manifest()
    read = older["hma_serve.v1.KvManifest"].FromString(manifest.SerializeToString())
    for field in ("model_fingerprint", "token_start", "token_count", "qk_norm", "format_major"):
        assert getattr(read, field) == getattr(manifest, field)
    offer = KvOffer(model_fingerprint=FINGERPRINT, semantics=SEMANTICS, k_offsets=True)
    old_offer = older["hma_serve.v1.KvOffer"].FromString(offer.SerializeToString())
    assert getattr(old_offer, "model_fingerprint") == FINGERPRINT  # noqa: B009
    assert "semantics" not in type(old_offer).DESCRIPTOR.fields_by_name
    plan = small_plan()
    units = random_units(plan)
    [frame] = kvblock.StreamWriter(plan, TICKET, EPOCH).frames(1, KV_ROLE_K, units, token_start=TOKEN_START)
    old_frame = older["hma_serve.v1.PushRequest"].FromString(frame)
    assert old_frame.SerializeToString() == frame
    assert PushRequest.FromString(frame).payload == units.tobytes()


def test_what_the_first_version_writes_is_read() -> None:
    older = message_classes(baseline("v1.0"))["hma_serve.v1.KvManifest"]
    written = small_manifest()
    written.format_minor = 0
    old = older.FromString(written.SerializeToString())
    plan = kvblock.validate_manifest(KvManifest.FromString(old.SerializeToString()))
    assert plan.payload_bytes == small_plan().payload_bytes
    spec = KvCodecSpec.FromString(kvblock.codec("tt_bfp8_b").spec().SerializeToString())
    old_offer = KvOffer(model_fingerprint=FINGERPRINT, k_codec=spec, v_codec=spec, rope=ROPE)
    accepts = kvblock.Acceptance(
        FINGERPRINT, LAYERS, HEADS, HEAD_DIM, (kvblock.codec("tt_bfp8_b"),), ROPE, qk_norm=True
    )
    kvblock.check_offer(old_offer, accepts)
