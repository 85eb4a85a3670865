"""Files that are nearly right: what the tests of untrusted folders load."""

import copy
import json
import struct

ODD = [
    None, True, -1, 0, 1.5, 2**31, 2**63, 10**400, float("nan"), float("inf"), "", "x", "../../etc/passwd", "/etc/x",
    [], [[]], [[0.5]], [[2.0]], [["x"]], {}, {"name": 1}, "a" * 10_000, [1] * 1000, "\x00", "model.embed_tokens/../x",
]  # fmt: skip


def keys(value, path=()):
    """Paths of all entries of nested objects."""
    for name, entry in value.items():
        yield (*path, name)
        if isinstance(entry, dict):
            yield from keys(entry, (*path, name))


def mutated_config(config, dice):
    told = json.loads(json.dumps(config))
    for _ in range(dice.choice([1, 1, 1, 2, 5])):
        path = dice.choice(list(keys(told)))
        place = told
        for name in path[:-1]:
            place = place[name]
        match dice.randrange(3):
            case 0:
                place[path[-1]] = copy.deepcopy(dice.choice(ODD))
            case 1:
                del place[path[-1]]
            case 2:
                place[f"{path[-1]}_more"] = copy.deepcopy(dice.choice(ODD))
        if not list(keys(told)):
            break
    return json.dumps(told).encode()


def mutated_header(content, dice, beside):
    """A safetensors file whose header says something else; `beside` is the configuration's name."""
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    name = dice.choice([key for key in header if key != "__metadata__"])
    match dice.randrange(6):
        case 0:
            header[name]["shape"] = dice.choice([[2**62, 2], [-1], [6, 31], [], [6, 32, 1], [0, 32], "six"])
        case 1:
            header[name]["dtype"] = dice.choice(["F16", "I64", "BOOL", "F8_E4M3", "nonsense", 3])
        case 2:
            header[name]["data_offsets"] = dice.choice([[0, 2**63], [-1, 5], [5, 1], [0, 0], [10, 778], "all"])
        case 3:
            header[dice.choice(["other", "../../escape", "x.ppd_embeddings"])] = header.pop(name)
        case 4:
            header[f"second.{name}"] = header[name]
        case 5:
            header["__metadata__"] = dice.choice(
                [{}, {beside: "[]"}, {beside: 3}, {beside: "{"}, "text", {"a": "b" * 99_999}]
            )
    told = json.dumps(header).encode()
    length = dice.choice([len(told), len(told), len(told), 2**63, 0, 5])
    return struct.pack("<Q", length) + told + data


def mutated_bytes(content, dice):
    match dice.randrange(4):
        case 0:
            return content[: dice.randrange(len(content))]
        case 1:
            at = dice.randrange(len(content))
            return content[:at] + dice.randbytes(dice.randrange(1, 20)) + content[at + 5 :]
        case 2:
            return dice.randbytes(dice.randrange(200))
        case _:
            return b"\x80\x04cposix\nsystem\n(S'touch escaped'\ntR."
