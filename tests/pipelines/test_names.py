import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.names import Names

texts = st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=20)


@settings(deadline=None)
@given(texts)
def test_a_column_is_the_list_that_it_was_made_of(names):
    column = Names(names)
    assert len(column) == len(names)
    assert list(column) == [column[k] for k in range(len(column))] == names
    assert column == names
    assert names == column
    assert column == Names(pa.chunked_array([names[:3], names[3:]], pa.string()))
    assert [name for chunk in column.chunks() for name in chunk] == names
    assert column[1:4] == names[1:4]
    assert column.take(np.arange(len(names))[::-1]) == names[::-1]
    assert pickle.loads(pickle.dumps(column)) == names


def test_what_is_in_it_and_what_is_not():
    column = Names(["a", "b", "c"])
    assert "b" in column
    assert "d" not in column
    assert 3 not in column
    assert column != ["a", "b"]
    assert column != ["a", "b", "d"]
    assert column[-1] == "c"
    with pytest.raises(IndexError):
        column[3]
