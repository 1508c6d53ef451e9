import json

import pytest

from titans_train.data import DataError
from titans_train.data.cursor import Cursor, check_goes_on, read_cursor, record

HALF = {"web": 0.5, "code": 0.5}
PRINTS = {"web": "aa", "code": "bb"}


def test_steps_begin_where_the_one_before_ended_whatever_the_batch_sizes() -> None:
    cursor = Cursor.constant(8).going_on(3, 4).going_on(5, 16)
    assert cursor.batch_sizes == ((0, 8), (3, 4), (5, 16))
    read = [number for step in range(8) for number in cursor.batch(step)]
    assert read == list(range(3 * 8 + 2 * 4 + 3 * 16))
    assert [len(cursor.batch(step)) for step in range(8)] == [8, 8, 8, 4, 4, 16, 16, 16]


def test_a_run_that_goes_back_forgets_the_batch_sizes_of_later_steps() -> None:
    cursor = Cursor.constant(8).going_on(10, 4)
    assert cursor.going_on(6, 8) == Cursor.constant(8)
    assert cursor.going_on(6, 2).batch_sizes == ((0, 8), (6, 2))
    assert cursor.going_on(12, 4) == cursor
    assert Cursor.constant(8).going_on(0, 4) == Cursor.constant(4)


def test_a_checkpoint_keeps_all_of_it() -> None:
    cursor = Cursor.constant(8).going_on(3, 4)
    found = json.loads(json.dumps(record(cursor, ((0, HALF),), PRINTS)))
    assert read_cursor(found) == cursor
    check_goes_on(found, ((0, HALF),), PRINTS, 5, "here")


def test_weights_may_change_from_the_next_step_on_and_not_before() -> None:
    found = json.loads(json.dumps(record(Cursor.constant(8), ((0, HALF), (20, {"web": 1, "code": 0})), PRINTS)))
    check_goes_on(found, ((0, HALF), (10, {"web": 0.1, "code": 0.9})), PRINTS, 10, "here")
    check_goes_on(found, ((0, {"web": 2.0, "code": 2.0}),), PRINTS, 10, "here")  # the same shares
    for weights in (((0, {"web": 1.0, "code": 0.5}),), ((0, HALF), (9, {"web": 1, "code": 0}))):
        with pytest.raises(DataError, match="may change from step 11 on only"):
            check_goes_on(found, weights, PRINTS, 10, "here")


def test_a_source_may_join_later_and_one_that_was_read_may_not_change() -> None:
    found = json.loads(json.dumps(record(Cursor.constant(8), ((0, HALF),), PRINTS)))
    joined = ((0, {**HALF, "new": 0}), (30, {"web": 1, "code": 1, "new": 1}))
    check_goes_on(found, joined, {**PRINTS, "new": "cc"}, 30, "here")
    with pytest.raises(DataError, match="other data of source 'code' .bb. than its path holds now .dd."):
        check_goes_on(found, ((0, HALF),), {**PRINTS, "code": "dd"}, 30, "here")


def test_a_source_that_was_not_read_yet_may_be_prepared_again() -> None:
    weights = ((0, {"web": 1.0, "code": 0.0}), (50, HALF))
    found = json.loads(json.dumps(record(Cursor.constant(8), weights, PRINTS)))
    check_goes_on(found, weights, {**PRINTS, "code": "dd"}, 30, "here")
