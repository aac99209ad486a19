"""Commands and replies through rings: one length, one order, nothing else accepted."""

from __future__ import annotations

import pytest

from memwall.errors import InputError
from memwall.retrieve.bolt import DELETE, GET, PUT, MapSettings, ObliviousMap
from memwall.retrieve.oblivious_ring import Client, Device, Ring, connected, derived_key, rings
from memwall.retrieve.untrusted import HostMemory, Tampered

pytest.importorskip("cryptography", reason="packets are sealed with the extra `oblivious`")
KEY = bytes(range(32))


def pair(slots: int = 64) -> tuple[Client, Device, Ring, Ring]:
    shape = MapSettings(capacity=64, value_bytes=4)
    served = ObliviousMap(shape, HostMemory(shape.num_pages, shape.page_bytes), bytes(32))
    served.fill()
    return *connected(served, KEY), *rings(4, slots)


def test_commands_are_answered_in_order() -> None:
    client, device, commands, replies = pair()
    told = [(PUT, 5, b"five"), (GET, 5, None), (PUT, 5, b"FIVE"), (DELETE, 5, None), (GET, 5, None)]
    for op, key, value in told:
        assert commands.push(client.command(op, key, value))
    assert device.serve(commands, replies) == 5
    found = [client.reply(replies.pop() or b"") for _ in told]
    assert [one.value for one in found] == [None, b"five", b"five", b"FIVE", None]
    assert [one.status for one in found] == ["absent", "found", "found", "found", "absent"]
    assert replies.pop() is None
    assert device.serve(commands, replies) == 0


def test_all_packets_have_one_length_and_no_two_are_equal() -> None:
    client, device, commands, replies = pair()
    sent = [client.command(op, 3, b"same" if op == PUT else None) for op in (GET, PUT, DELETE, GET, GET)]
    assert {len(one) for one in sent} == {5 + 4 + 16}
    assert len(set(sent)) == 5
    for one in sent:
        commands.push(one)
    device.serve(commands, replies)
    assert commands.moved_bytes == 5 * 25
    assert replies.moved_bytes == 5 * 21


def test_rings_wrap_and_fill() -> None:
    client, device, commands, replies = pair(slots=3)
    for turn in range(7):
        sent = 0
        while commands.push(packet := client.command(PUT, turn, bytes([turn] * 4))):
            sent += 1
        assert sent == 3
        # what did not go in is sent later, or its place would be missing
        assert [device.serve(commands, replies, most=2), device.serve(commands, replies)] == [2, 1]
        for _ in range(3):
            client.reply(replies.pop() or b"")
        assert commands.push(packet)
        device.serve(commands, replies)
        client.reply(replies.pop() or b"")
    assert len(device.served) == 7


def test_no_more_is_taken_than_replies_have_room() -> None:
    client, device, commands, replies = pair(slots=3)
    for _ in range(3):
        commands.push(client.command(GET, 1))
    assert device.serve(commands, replies) == 3
    commands.push(client.command(GET, 1))
    assert device.serve(commands, replies) == 0
    replies.pop()
    assert device.serve(commands, replies) == 1


@pytest.mark.parametrize("change", ["changed", "repeated", "left out", "another key"])
def test_what_is_not_next_is_refused(change: str) -> None:
    client, device, commands, replies = pair()
    if change == "another key":
        client, salt = Client(bytes(32), 4), client.salt
        client.meet(device.salt)
        assert client.salt != salt
    first, second = client.command(GET, 1), client.command(GET, 2)
    sent = {"changed": [first[:-1] + bytes([first[-1] ^ 1])], "repeated": [first, first], "left out": [second],
            "another key": [first]}[change]  # fmt: skip
    for one in sent:
        commands.push(one)
    with pytest.raises(Tampered, match="sent in this place"):
        device.serve(commands, replies)


def test_a_reply_is_no_command() -> None:
    assert derived_key(KEY, "one") != derived_key(KEY, "other")
    client, device, commands, replies = pair()
    commands.push(client.command(GET, 1))
    device.serve(commands, replies)
    packet = replies.pop() or b""
    other = Client(KEY, 4)
    other.meet(device.salt)
    with pytest.raises(Tampered):
        other.reply(packet)
    assert client.reply(packet).status == "absent"


def test_a_connection_cannot_be_played_again() -> None:
    client, device, commands, replies = pair()
    packet = client.command(PUT, 1, b"once")
    again = Device(device.served, KEY)
    again.meet(client.salt)  # the host sends the client's salt and packets to a device that was started anew
    commands.push(packet)
    with pytest.raises(Tampered):
        again.serve(commands, replies)
    with pytest.raises(InputError, match="meet once"):
        again.meet(client.salt)
    with pytest.raises(InputError, match="meet first"):
        Client(KEY, 4).command(GET, 1)
    with pytest.raises(InputError, match="16 bytes"):
        Client(KEY, 4).meet(b"short")


def test_a_command_that_is_none_costs_an_access() -> None:
    client, device, commands, replies = pair()
    commands.push(client.command(9, 1))
    device.serve(commands, replies)
    assert client.reply(replies.pop() or b"").status == "refused"
    assert device.served.private.count("accesses") == 1


def test_bad_packets() -> None:
    client, _, commands, _ = pair()
    with pytest.raises(InputError, match="this map's have 4"):
        client.command(PUT, 1, b"12345")
    with pytest.raises(InputError, match="key -1"):
        client.command(GET, -1)
    with pytest.raises(InputError, match="this ring's have 25"):
        commands.push(b"short")
    with pytest.raises(InputError, match="one at least"):
        Ring(0, 5)
    with pytest.raises(InputError, match="it has 32"):
        Client(b"short", 4)
    assert commands.data == bytes(64 * 25)
