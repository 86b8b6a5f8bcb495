"""The time limit of an attempt, where it is held back."""

from concurrent.futures import ThreadPoolExecutor

from worker.limit import call_within, held_back


def test_a_call_that_ends_on_the_way_into_a_held_back_block_ends() -> None:
    """A strike may be felt when the limit is held back already and the block has not begun: nobody will let it go."""
    entered = []

    def enter() -> None:
        entered.append(held_back())
        entered[-1].__enter__()

    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(call_within, 5, enter).result(2)
        finally:
            thread.submit(entered.clear)  # as the exception does it when it has been dealt with
