"""What a text is found by."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.store.rows import Scope
from server.store.search_terms import (
    MAX_INDEXED_CHARS,
    MAX_QUERY_TERMS,
    MAX_TERM_CHARS,
    index_terms,
    owner_term,
    query_terms,
)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("", []),
        (" \t\n.,;!?\"'*-()_", []),
        ("Rex is my DOG, my dog.", ["rex", "is", "my", "dog", "my", "dog"]),
        ("Straße ﬁnd Ⅳ", ["strasse", "find", "iv"]),
        ("in 2026: 3.14", ["in", "2026", "3", "14"]),
        ("don't snake_case", ["don", "t", "snake", "case"]),
        ("cafe\u0301 CAFÉ", ["café", "café"]),
        ("हिन्दी", ["हिन्दी"]),
        ("猫", ["猫"]),
        ("我的猫", ["我", "我的", "的", "的猫", "猫"]),
        ("iPhoneを買った", ["iphone", "を", "を買", "買", "買っ", "っ", "った", "た"]),
        ("ｶﾞｰﾙ", ["ガ", "ガー", "ー", "ール", "ル"]),
        ("한국", ["한", "한국", "국"]),
        ("\uff21\uff22\uff23\u3000\uff11\uff12\uff13", ["abc", "123"]),
        ("😀 a\0b \ud800", ["a", "b"]),
    ],
)
def test_texts_become_terms(text: str, terms: list[str]) -> None:
    assert index_terms(text) == terms


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("What is my dog's name?", ["dog", "name"]),
        ("who is it", ["who", "is", "it"]),
        ("dog dog DOG", ["dog"]),
        ("猫", ["猫"]),
        ("我的猫", ["我的", "的猫"]),
        ("猫 我的猫", ["猫", "我的", "的猫"]),
        ("NEAR(a b) AND * NOT", ["near", "b"]),
        ("...", []),
    ],
)
def test_queries_ask_for_each_telling_term_once(text: str, terms: list[str]) -> None:
    assert query_terms(text) == terms


def test_terms_are_bounded() -> None:
    assert len(query_terms(" ".join(f"w{number}" for number in range(1000)))) == MAX_QUERY_TERMS
    assert index_terms("x" * 1000) == ["x" * MAX_TERM_CHARS]
    assert index_terms("a" * MAX_INDEXED_CHARS + " late") == ["a" * MAX_TERM_CHARS]
    assert len(index_terms("猫" * (2 * MAX_INDEXED_CHARS))) == 2 * MAX_INDEXED_CHARS - 1
    expanding = "\N{ARABIC LIGATURE SALLALLAHOU ALAYHE WASALLAM}"
    assert sum(map(len, index_terms(expanding * MAX_INDEXED_CHARS))) <= MAX_INDEXED_CHARS


@given(st.text())
def test_a_term_is_never_more_than_letters_digits_and_marks(text: str) -> None:
    for term in (*index_terms(text), *query_terms(text)):
        assert term
        assert all(unicodedata.category(character)[0] in "LNM" for character in term)
        term.encode()


@given(st.text(min_size=1))
def test_a_text_is_found_by_itself(text: str) -> None:
    assert set(query_terms(text)) <= set(index_terms(text))
    assert bool(query_terms(text)) == bool(index_terms(text))


def test_owners_are_kept_apart() -> None:
    scopes = [
        Scope("a", "b", "c"),
        Scope("ab", "", "c"),
        Scope("a", "bc", ""),
        Scope("", "ab", "c"),
        Scope("b", "a", "c"),
    ]
    assert len({owner_term(scope) for scope in scopes}) == len(scopes)
    assert owner_term(Scope("a\0", "b\ud800", "c")) == owner_term(Scope("a\N{REPLACEMENT CHARACTER}", "b?", "c"))


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_has_the_terms_that_it_has_beside_other_text(text: str) -> None:
    assert [*index_terms(text), "é"] == index_terms(f"{text} é")
