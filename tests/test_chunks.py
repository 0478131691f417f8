import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistoken.errors import UserError
from vistoken.jobs import chunks
from vistoken.jobs.chunks import chunk_table


def read_all(path, tmp_path, chunk_items=3):
    table = chunk_table(path, chunk_items, tmp_path / "cache" / f"{path.name}.chunks.json")
    return [item for index in range(len(table)) for item in table.read(table[index])]


def test_lines_with_blanks_bom_crlf_and_a_broken_one(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ['\ufeff{"id": 0}\r', "\r", "   ", '{"id": 1}', '{"id": 2', '{"id": 3, "t": "减"}', "", '{"id": 4}']
    path.write_bytes("\n".join(lines).encode())
    items = read_all(path, tmp_path, chunk_items=2)
    assert [item.index for item in items] == [0, 1, 2, 3, 4]
    assert [item.where for item in items] == ["line 1", "line 4", "line 5", "line 6", "line 8"]
    assert [item.value and item.value["id"] for item in items] == [0, 1, None, 3, 4]
    assert items[2].error.detail == "unexpected end of data (column 9)"
    assert items[3].value["t"] == "减"


@given(
    st.lists(
        st.recursive(
            st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=6,
        ),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_a_list_comes_back_element_by_element(tmp_path_factory, values, indent, ascii_only):
    tmp_path = tmp_path_factory.mktemp("list")
    path = tmp_path / "a.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    items = read_all(path, tmp_path)
    assert [item.value for item in items] == values
    assert [json.loads(item.raw) for item in items] == values
    assert all(b"\n" not in item.raw for item in items)


def test_a_list_longer_than_the_window(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "BLOCK", 7)
    values = [{"n": n, "text": "ß" * n} for n in range(50)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    assert [item.value for item in read_all(path, tmp_path)] == values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"conversations": []}', "expected a JSON list, found '{'"),
        ("", "found nothing"),
        ("[]", "no items"),
        ('[{"a": 1},\n {"b": 2', "line 2: not valid JSON.*the file ends before the list does"),
        ('[{"a": 1} {"b": 2}]', "expected ',' or ']'"),
        ('[{"a": 1},\n]', "line 2: not valid JSON: a comma after the last element"),
        ('[{"a": 1}] 3', "expected nothing after the list"),
        ('[{"a": 1},\n\n{"b": }]', "line 3: not valid JSON"),
        ("[1,\n" + "[" * 100_000, "line 2: brackets are nested too deeply"),
    ],
)
def test_a_json_that_is_no_list_says_where(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_all(path, tmp_path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_an_element_is_read_alike_in_both_forms(tmp_path, name):
    """What the output could not hold is bad in a list, too, and a number of any length is no reason to stop."""
    values = ["1", "NaN", '"\\ud800"', "1e999", "9" * 5000]
    elements = [f'{{"id": {value}}}' for value in values]
    text = "[" + ",\n".join(elements) + "]" if name.endswith(".json") else "\n".join(elements)
    (tmp_path / name).write_text(text)
    items = read_all(tmp_path / name, tmp_path)
    assert items[0].value == {"id": 1}
    assert all(item.value is None and "(column " in item.error.detail for item in items[1:])


@pytest.mark.parametrize("content", ["[\n{}\n]", "[{\n}]", '\ufeff[{"a": 1},\r\n{}]'])
def test_a_list_named_jsonl_is_told(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: a JSON list .* Name the file \.json"):
        read_all(tmp_path / "a.jsonl", tmp_path)


def test_a_missing_and_an_empty_file(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl: cannot read the input"):
        read_all(tmp_path / "gone.jsonl", tmp_path)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match=r"folder\.json: cannot read the input \(Is a directory\)"):
        read_all(tmp_path / "folder.json", tmp_path)
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="no items"):
        read_all(tmp_path / "a.jsonl", tmp_path)


def test_the_table_is_cached_until_the_file_changes(tmp_path):
    path, cache = tmp_path / "a.jsonl", tmp_path / "a.chunks.json"
    path.write_text('{"id": 0}\n')
    first = chunk_table(path, 3, cache)
    assert chunk_table(path, 3, cache) == first
    path.write_text('{"id": 0}\n{"id": 1}\n')
    second = chunk_table(path, 3, cache)
    assert (second.items, second.sha256 != first.sha256) == (2, True)
    for damaged in ("", "[]", "{}", "{"):
        cache.write_text(damaged)
        assert chunk_table(path, 3, cache) == second
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl: cannot read the input"):
        second.read(second[0])


def test_bytes_that_are_not_utf8_and_marks_in_the_middle(tmp_path):
    """Files that were written elsewhere and appended to one another."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 2}\n{"a": "caf\xe9"}\n\xef\xbb\xbf\n{"a": "\\ud800"}\n')
    table = chunk_table(path, 10, tmp_path / "cache")
    first, second, latin, half = table.read(table[0])
    assert (first.value, second.value) == ({"a": 1}, {"a": 2})
    assert latin.error.detail == "not UTF-8: 0xe9 at byte 11; save the file as UTF-8"
    assert half.error.detail and "UTF-8" not in half.error.detail
