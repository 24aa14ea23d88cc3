"""The lm:// wire, against bytes written out from its description."""

import struct
from types import SimpleNamespace
from typing import Any

import pytest

from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.errors import WireError
from agnostic_cache.wire import (
    CacheEngineKey,
    ClientCommand,
    ClientMetaMessage,
    LayerCacheEngineKey,
    MemoryFormat,
    ServerMetaMessage,
    ServerReturnCode,
    parse_cache_key,
)

KEY = CacheEngineKey("meta/llama", 2, 1, 0xBE23, Dtype.BFLOAT16)
CODES = {0: None, 2: "float16", 3: "bfloat16", 4: "float32", 5: "float64", 6: "uint8", 7: "float8_e4m3fn"}
CODES |= {8: "float8_e5m2"}


def request(**changes: Any) -> bytes:
    """Pack a request field by field."""
    fields: dict[str, Any] = {"command": 1, "length": 96, "fmt": 1, "dtype": 3, "location": 0, "shape": (2, 3, 4, 2)}
    fields |= {"key": b"meta/llama@2@1@be23@bfloat16"} | changes
    key, shape = fields.pop("key"), fields.pop("shape")
    assert isinstance(key, bytes)
    return struct.pack("<9i", *fields.values(), *shape) + key.ljust(150, b" ")


def response(**changes: Any) -> bytes:
    fields: dict[str, Any] = {"code": 200, "length": 96, "fmt": 1, "dtype": 3, "shape": (2, 3, 4, 2), "location": 0}
    fields |= changes
    shape, location = fields.pop("shape"), fields.pop("location")
    return struct.pack("<9i", *fields.values(), *shape, location)


def message(**changes: Any) -> ClientMetaMessage:
    fields: dict[str, Any] = {"command": ClientCommand.PUT, "key": KEY, "length": 96, "fmt": MemoryFormat.KV_2LTD}
    return ClientMetaMessage(**{**fields, "dtype": Dtype.BFLOAT16, "shape": (2, 3, 4, 2), **changes})


class TestKeys:
    @pytest.mark.parametrize(
        ("key", "text"),
        [
            (KEY, "meta/llama@2@1@be23@bfloat16"),
            (CacheEngineKey("m", 1, 0, -5, Dtype.FLOAT16), "m@1@0@-5@half"),
            (CacheEngineKey("m", 1, -1, 0, Dtype.FLOAT32), "m@1@-1@0@float"),
            (CacheEngineKey("m", 1, 0, 255, Dtype.FLOAT64), "m@1@0@ff@double"),
            (CacheEngineKey("m", 1, 0, 1, Dtype.INT8, {"lmcache.tag.b": 2, "x": 1, "lmcache.tag.a": "p%q"}),
             "m@1@0@1@int8@b%2@a%p%q"),
            (LayerCacheEngineKey("m", 1, 0, 1, Dtype.BOOL, layer_id=12), "m@1@0@1@bool@12"),
            (LayerCacheEngineKey("m", 1, 0, 1, Dtype.FLOAT8_E5M2, {"lmcache.tag.a": "1"}, layer_id=0),
             "m@1@0@1@fp8_e5m2@0@a%1"),
            (CacheEngineKey("user@host/@m", 1, 0, 1, Dtype.UINT8), "user@host/@m@1@0@1@uint8"),
        ],
    )  # fmt: skip
    def test_to_string_and_back(self, key: CacheEngineKey, text: str) -> None:
        assert key.to_string() == text
        read = parse_cache_key(text)
        assert read == key
        assert hash(read) == hash(key)
        assert type(read) is type(key)
        assert type(key).from_string(text) == key

    def test_two_spellings_are_one_key(self) -> None:
        assert parse_cache_key("m@1@0@0FF@half ") == parse_cache_key("m@01@0@ff@half")

    def test_what_is_part_of_a_key(self) -> None:
        tagged = CacheEngineKey("m", 1, 0, 1, Dtype.INT8, {"lmcache.tag.a": "1", "other": "x"})
        assert tagged == CacheEngineKey("m", 1, 0, 1, Dtype.INT8, {"lmcache.tag.a": "1"})
        assert tagged.tags == (("a", "1"),)
        others = [
            CacheEngineKey("m", 1, 0, 1, Dtype.INT8),
            CacheEngineKey("m", 1, 0, 1, Dtype.INT8, {"lmcache.tag.a": "2"}),
            CacheEngineKey("m", 1, 0, 1, Dtype.UINT8, {"lmcache.tag.a": "1"}),
            tagged.with_new_worker_id(1),
            *tagged.split_layers(2),
        ]
        assert len({tagged, *others}) == 1 + len(others)
        assert tagged.get_first_layer() == tagged.split_layers(2)[0] != tagged

    @pytest.mark.parametrize("name", ["torch.float16", "float16", SimpleNamespace(name="float16")], ids=str)
    def test_dtypes_are_taken_by_their_names(self, name: Any) -> None:
        assert CacheEngineKey("m", 1, 0, b"\x01\x00", name) == CacheEngineKey("m", 1, 0, 256, Dtype.FLOAT16)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    @pytest.mark.parametrize(
        "text",
        ["", "m", "m@1@0@ff", "m@1@0@ff@int3", "m@x@0@ff@half", "m@1@0@0xff@half", "m@1@0@fg@half", "@1@0@ff@half",
         "m@1@0@ff@half@", "m@1@0@ff@half@-1", "m@1@0@ff@half@tag", "m@99999999999@0@ff@half", "m@1@0@ff@half@٣"],
    )  # fmt: skip
    def test_what_is_no_key(self, text: str) -> None:
        with pytest.raises(WireError):
            parse_cache_key(text)

    @pytest.mark.parametrize(
        ("dtype", "configs"),
        [("complex64", {}), ("object", {}), ("int8", {"lmcache.tag.a": "1@2"}), ("int8", {"lmcache.tag.a%": "1"})],
    )
    def test_what_cannot_be_in_one(self, dtype: Any, configs: dict[str, str]) -> None:
        with pytest.raises(WireError):
            CacheEngineKey("m", 1, 0, 1, dtype, configs)

    @pytest.mark.parametrize(
        ("kind", "text"), [(LayerCacheEngineKey, "m@1@0@ff@half"), (CacheEngineKey, "m@1@0@ff@half@1")]
    )
    def test_each_class_reads_its_own(self, kind: type[CacheEngineKey], text: str) -> None:
        with pytest.raises(WireError):
            kind.from_string(text)


class TestMessages:
    def test_a_request_is_186_bytes(self) -> None:
        assert ClientMetaMessage.packlength() == 186
        assert message().serialize() == request()
        assert ClientMetaMessage.deserialize(request()) == message()
        assert ClientMetaMessage.deserialize(memoryview(bytearray(request()))) == message()

    def test_a_response_is_36_bytes(self) -> None:
        found = ServerMetaMessage(ServerReturnCode.SUCCESS, 96, MemoryFormat.KV_2LTD, Dtype.BFLOAT16, (2, 3, 4, 2))
        assert ServerMetaMessage.packlength() == 36
        assert found.serialize() == response()
        assert ServerMetaMessage.deserialize(response()) == found
        miss = ServerMetaMessage(ServerReturnCode.FAIL, 0, MemoryFormat.KV_2LTD, Dtype.FLOAT16, (0, 0, 0, 0))
        assert miss.serialize() == response(code=400, length=0, dtype=2, shape=(0, 0, 0, 0))

    @pytest.mark.parametrize("command", ClientCommand)
    def test_commands(self, command: ClientCommand) -> None:
        assert ClientMetaMessage.deserialize(request(command=int(command))).command is command

    @pytest.mark.parametrize(("code", "name"), CODES.items())
    def test_dtypes(self, code: int, name: str | None) -> None:
        assert ClientMetaMessage.deserialize(request(dtype=code)).dtype == name
        assert message(dtype=name).serialize() == request(dtype=code)
        assert ServerMetaMessage.deserialize(response(dtype=code)).dtype == name

    def test_the_other_code_of_half_is_read_and_not_written(self) -> None:
        found = ClientMetaMessage.deserialize(request(dtype=1))
        assert found.dtype is Dtype.FLOAT16
        assert found.serialize() == request(dtype=2)

    @pytest.mark.parametrize("fmt", MemoryFormat)
    def test_formats(self, fmt: MemoryFormat) -> None:
        found = ClientMetaMessage.deserialize(request(fmt=int(fmt), shape=(96, 0, 0, 0)))
        assert found.fmt is fmt
        assert found.shape == ((96, 0, 0, 0) if "BINARY" in fmt.name else (96,))
        assert found.serialize() == request(fmt=int(fmt), shape=(96, 0, 0, 0))

    def test_locations(self) -> None:
        for code, name in enumerate((None, "LocalCPUBackend", "LocalDiskBackend")):
            assert ClientMetaMessage.deserialize(request(location=code)).location == name
            assert message(location=name).serialize() == request(location=code)
            assert ServerMetaMessage.deserialize(response(location=code)).location == name

    def test_shapes_have_one_axis_at_least(self) -> None:
        assert ClientMetaMessage.deserialize(request(shape=(0, 0, 0, 0))).shape == (0,)
        assert ClientMetaMessage.deserialize(request(shape=(2, 0, 3, 0))).shape == (2, 0, 3)

    @pytest.mark.parametrize(
        "header",
        [
            b"",
            request()[:-1],
            request() + b" ",
            request(command=0),
            request(command=6),
            request(length=-1),
            request(length=-(2**31)),
            request(fmt=9),
            request(fmt=-1),
            request(dtype=9),
            request(dtype=-1),
            request(location=3),
            request(location=-1),
            request(shape=(2, -3, 4, 2)),
            request(key=b"\xff\xfe@1@0@ff@half"),
            request(key=b""),
            request(key=b"m@1@0@ff@half".ljust(150, b"\0")),
            request(key=b"../../etc/passwd"),
        ],
    )
    def test_what_is_no_request(self, header: bytes) -> None:
        with pytest.raises(WireError):
            ClientMetaMessage.deserialize(header)

    @pytest.mark.parametrize(
        "header",
        [b"", response(code=500), response(length=-1), response(fmt=9), response(dtype=9), response(location=3)],
    )
    def test_what_is_no_response(self, header: bytes) -> None:
        with pytest.raises(WireError):
            ServerMetaMessage.deserialize(header)

    @pytest.mark.parametrize(
        "changes",
        [
            {"length": 2**31},
            {"length": -1},
            {"shape": (1, 1, 1, 1, 1)},
            {"shape": (2**31,)},
            {"dtype": Dtype.INT8},
            {"location": "elsewhere"},
            {"key": CacheEngineKey("m" * 150, 1, 0, 1, Dtype.INT8)},
        ],
    )
    def test_what_cannot_be_sent(self, changes: dict[str, Any]) -> None:
        with pytest.raises(WireError):
            message(**changes).serialize()

    def test_keys_are_measured_in_bytes(self) -> None:
        name = "é" * 68
        fits = message(key=CacheEngineKey(name, 1, 0, 1, Dtype.INT8))
        assert len(fits.key.to_string().encode()) == 147
        assert ClientMetaMessage.deserialize(fits.serialize()) == fits
        with pytest.raises(WireError):
            message(key=CacheEngineKey(name + "éé", 1, 0, 1, Dtype.INT8)).serialize()
