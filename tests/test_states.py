"""What a base says of replies: asked once, as long as there is room to keep it."""

import pytest
import torch
from test_train import replies
from tiny import tiny

from ppd_compose.states import KeptStates, ReplyStates


@pytest.mark.parametrize(("room", "asked"), [(1 << 20, 2), (100, 3), (0, 4)])
def test_what_has_room_is_asked_for_once(room, asked):
    base, told = tiny(), []

    def ask(reply):
        told.append(reply)
        return {"length": torch.full((10,), float(len(reply.ids)), dtype=torch.float64)}  # 80 bytes

    kept = KeptStates(base, ask, kept_bytes=room)
    first, second = replies(base, 2)
    for reply in (first, second, first, second):
        assert kept(reply)["length"][0] == len(reply.ids)
    assert len(told) == asked


def test_states_are_those_of_the_forward_within_the_length():
    base = tiny()
    reply = replies(base, 1)[0]
    states = ReplyStates(base, [1, 3], max_length=9)(reply)
    said = base(input_ids=torch.tensor([reply.ids[:9]]), output_hidden_states=True).hidden_states
    assert states.keys() == {1, 3}
    for layer, told in states.items():
        assert told.shape == (9, 32)
        torch.testing.assert_close(told, said[layer][0])
