"""Bytes are tokens."""

from __future__ import annotations

import pytest

from holdfast.trainer.sizing import MIN_VOCAB_SIZE
from holdfast.trainer.tokenizer import BOS, EOS, PAD, VOCAB_SIZE, decode, encode


def test_the_id_of_a_byte_is_its_value() -> None:
    assert encode("aé€") == [0x61, 0xC3, 0xA9, 0xE2, 0x82, 0xAC]


@pytest.mark.parametrize("text", ["", "plain", "héllo\n wörld €", "\0\x7f", "🦦"])
def test_text_survives_the_round_trip(text: str) -> None:
    assert decode(encode(text)) == text


def test_specials_lie_above_the_bytes_and_inside_the_vocabulary() -> None:
    assert (BOS, EOS, PAD, VOCAB_SIZE) == (256, 257, 258, 259)
    assert VOCAB_SIZE == MIN_VOCAB_SIZE


def test_specials_are_dropped_and_broken_bytes_replaced() -> None:
    assert decode([BOS, 104, PAD, 105, EOS]) == "hi"
    assert decode([0xE2, 0x82, 104]) == "\ufffdh"


def test_any_iterable_of_ids_decodes() -> None:
    assert decode(i for i in (104, 105)) == "hi"
