"""Documents of text files, JSON lines, JSON arrays and parquet files, in bounded memory.

The format is found in the content (magic bytes, first characters) or given; a name only helps to refuse what
claims to be something else. gz, zst, xz and bz2 are unpacked on the way.
What is not understood is refused by name.

Text: UTF-8, or UTF-16 and UTF-32 with a byte-order mark, which is dropped; CRLF and CR line ends become LF.
Strings inside JSON and parquet stay as they are.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError

FORMATS = ("auto", "text", "jsonl", "parquet")
CHUNK, SNIFF = 2 ** 18, 2 ** 16  # bytes read at once; bytes looked at to find a format
PACKED = {
    "gz": rb"\x1f\x8b", "zst": rb"\x28\xb5\x2f\xfd", "xz": rb"\xfd7zXZ\x00",
    "bz2": rb"BZh[1-9](1AY&SY|\x17rE8P)"
}
MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
         # UTF-32 first: its mark begins like UTF-16's
         codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
SHARD = (20240520).to_bytes(4, "little")
REFUSED = {
    b"%PDF-": "a PDF document", b"PK\x03\x04": "a zip archive (docx, xlsx, epub and .pt files are such too)",
    b"PK\x05\x06": "an empty zip archive", b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image",
    b"SQLite format 3\0": "an SQLite database", b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\xd0\xcf\x11\xe0": "an old Office document", b"{\\rtf": "an RTF document",
    b"%!PS": "a PostScript document", b"\x7fELF": "a program", b"\x93NUMPY": "a numpy array",
    b"\x89HDF": "an HDF5 file", b"Obj\x01": "an Avro file", b"\x04\x22\x4d\x18": "lz4 data",
    b"WARC/": "a web archive (WARC)", SHARD: "a token shard already",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself (git lfs pull)",
    **{bytes([0x80, i]): "a pickle" for i in range(2, 6)}
}
REFUSED_BINARY = {
    b"GIF8": "a GIF image",
    b"RIFF": "a RIFF file (sound, film or WebP)",
    b"Rar!": "a RAR archive",
    b"MZ": "a program",
    b"ARROW1": "an Arrow file",
    b"ORC": "an ORC file",
    b"ID3": "a sound file",
    # a text may begin so: only with zero bytes
    b"OggS": "a sound file",
    b"GGUF": "a GGUF model",
}
MARKUP = re.compile(r"(?i)\s*<(!doctype html|html|\?xml)")
JSON_NAMES = (".json", ".jsonl", ".ndjson")
TABLES = (".csv", ".tsv", ".xls", ".ods")
HALF = re.compile("[\ud800-\udfff]")
SPACES = re.compile(r"[ \t\r\n]*")


class Reader:
    """One input file: its unpacked bytes, its format (text, jsonl, array or parquet) and its encoding."""

    def __init__(self, path: Path | str, format: str = "auto", field: str = "text",
                 separator: str = "\n\f\n") -> None:
        self.path, self.field, self.separator = Path(path), field, separator
        self.packed, self.encoding, self.mark = "", "utf-8", b""
        with self.opened() as file:
            self.format = self.find_format(file, format)
        self.hint = "" if format != "auto" else "; if the file is plain text, add --format text"

    def opened(self) -> contextlib.AbstractContextManager[BinaryIO]:
        """The file's bytes, unpacked. Errors of opening and reading become one line."""
        return _named(self.path, self)

    def find_format(self, file: BinaryIO, format: str) -> str:
        head = file.read(SNIFF)
        if head.startswith(b"PAR1") and format in ("auto", "parquet"):
            if self.packed:
                raise UserError(f"{self.path}: a parquet file inside {self.packed}: unpack it first")
            return "parquet"
        if format == "parquet":
            raise UserError(f"{self.path}: not a parquet file (those begin with PAR1): leave --format out")
        for mark, encoding in MARKS.items():
            if head.startswith(mark):
                self.mark, self.encoding = mark, encoding
                break
        else:
            if format == "auto":
                refuse_by_content(self.path, head)
        start = codecs.getincrementaldecoder(self.encoding)("replace").decode(head[len(self.mark):])
        names = [s.lower() for s in self.path.suffixes[-2 if self.packed else -1:]]
        if format == "text":
            return "text"
        if format == "auto":
            refuse_by_name(self.path, names, start)
        sure = format == "jsonl" or any(name in JSON_NAMES for name in names)
        return json_format(self.path, start, sure) or "text"

    def documents(self) -> Iterator[tuple[Iterator[str], str]]:
        """(pieces of the text, where it stands) of every document, in order;
        pieces must be used before the next one."""
        if self.format == "parquet":
            yield from ((pieces(text), where) for text, where in self.parquet())
            return
        with self.opened() as file:
            file.read(len(self.mark))
            if self.format == "text":
                for number, document in enumerate(split(self.plain(file), self.separator), 1):
                    yield document, f"{self.path}, document {number}"
                return
            records = self.lines(file) if self.format == "jsonl" else self.elements(file)
            for record, where in records:
                yield pieces(self.text(record, where)), where

    def decoded(self, file: BinaryIO) -> Iterator[str]:
        """The text, chunk by chunk. UserError names the byte that is not text."""
        decoder, read = codecs.getincrementaldecoder(self.encoding)(), len(self.mark)
        while True:
            chunk = file.read(CHUNK)
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                inside = f" of the unpacked {self.packed}" if self.packed else ""
                raise UserError(f"{self.path}: not {self.encoding.upper()} text ({error.reason} at byte "
                                f"{read - held + error.start}{inside}): convert or mend it first") from None
            read += len(chunk)
            if text:
                yield text
            if not chunk:
                return

    def plain(self, file: BinaryIO) -> Iterator[str]:
        """The text with LF line ends."""
        newlines = io.IncrementalNewlineDecoder(None, translate=True)
        for chunk in self.decoded(file):
            if self.hint and "\0" in chunk:
                raise UserError(f"{self.path} is binary data behind its beginning (a zero byte): choose "
                                f"other files{self.hint}")
            yield newlines.decode(chunk)
        yield newlines.decode("", final=True)

    # ----- JSON

    def lines(self, file: BinaryIO) -> Iterator[tuple[Any, str]]:
        """(value, where) of each line that is not empty."""
        number, parts = 0, []

        def value(line):
            try:
                return json.loads(line)
            # ValueError: JSONDecodeError, and numbers of too many digits
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.path}, line {number}: not valid JSON "
                                f"({getattr(error, 'msg', None) or error}): mend or remove the "
                                f"line{self.hint}") from None

        for chunk in itertools.chain(self.decoded(file), ["\n"]):
            first, *more = chunk.split("\n")
            parts.append(first)
            for following in more:
                number += 1
                line, parts = "".join(parts), [following]
                if line.strip():
                    line = value(line)  # under the same name, so that a long line is not held twice
                    yield line, f"{self.path}, line {number}"

    def elements(self, file: BinaryIO) -> Iterator[tuple[Any, str]]:
        """(value, where) of each element of a JSON array."""
        chunks, decoder, number = self.decoded(file), json.JSONDecoder(), 1
        buffer, at, ended = next(chunks, "").lstrip(), 1, False  # behind the bracket

        def more():
            """Read as much again as is held, so that a long element is not parsed over and over."""
            nonlocal buffer, at, ended
            parts, wanted = [buffer[at:]], 1 + len(buffer) - at
            while wanted > 0 and not ended:
                part = next(chunks, None)
                ended = part is None
                parts.append(part or "")
                wanted -= len(part or "")
            buffer, at = "".join(parts), 0

        def wrong(reason):
            return UserError(
                f"{self.path}, element {number}: not valid JSON ({reason}): mend the array{self.hint}")

        def mark():
            """The next character that is not a blank."""
            nonlocal at
            while (at := SPACES.match(buffer, at).end()) == len(buffer):
                if ended:
                    raise wrong("the array does not end")
                more()
            return buffer[at]

        empty = mark() == "]"
        while not empty:
            try:
                value, end = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:
                if ended or (error.pos < len(buffer) - 16
                             and not error.msg.startswith("Unterminated string")):
                    raise wrong(error.msg) from None
                more()
                continue
            except (RecursionError, ValueError) as error:
                raise wrong(_first_line(error)) from None
            at = end
            yield value, f"{self.path}, element {number}"
            del value
            if mark() == "]":
                break
            if buffer[at] != ",":
                raise wrong("no comma behind it")
            at, number = at + 1, number + 1
            mark()
        if buffer[at + 1:].strip() or any(part.strip() for part in chunks):
            raise wrong("something follows the array")

    def text(self, record: Any, where: str) -> str:
        """The text of a JSON record: its field, or itself if it is a string."""
        if isinstance(record, str):
            text = record
        elif not isinstance(record, dict):
            raise UserError(f"{where}: {_kind(record)} instead of an object with the field {self.field!r}: "
                            f"mend or remove it{self.hint}")
        elif self.field not in record:
            raise UserError(
                f"{where}: no text in field {self.field!r}, the record has {_names(record)}: choose one with "
                "--field")
        elif not isinstance(record[self.field], str):
            raise UserError(f"{where}: no text in field {self.field!r} but {_kind(record[self.field])}: mend "
                            "or remove the record, or choose another --field")
        else:
            text = record[self.field]
        return checked(text, where)

    # ----- parquet

    def parquet(self) -> Iterator[tuple[str, str]]:
        """(text, where) of each row."""
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise UserError(f"{self.path}: reading parquet needs pyarrow: pip install pyarrow, or export the "
                            "file as JSON lines") from None
        row = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                schema = file.schema_arrow
                if self.field not in schema.names:
                    raise UserError(f"{self.path}: no column {self.field!r}, the file has "
                                    f"{_names(schema.names)}: choose one with --field")
                held = schema.field(self.field).type
                if pyarrow.types.is_dictionary(held):
                    held = held.value_type
                if not (pyarrow.types.is_string(held) or pyarrow.types.is_large_string(held)
                        or pyarrow.types.is_string_view(held)):
                    raise UserError(f"{self.path}: column {self.field!r} holds {held} instead of text: "
                                    "choose another --field")
                for batch in file.iter_batches(batch_size=256, columns=[self.field]):
                    for value in batch.column(0):
                        row += 1
                        text = value.as_py()
                        if text is None:
                            raise UserError(f"{self.path}, row {row}: no text in column {self.field!r} "
                                            "(null): remove the row, or choose another --field")
                        yield text, f"{self.path}, row {row}"
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.path}: cannot be read as parquet after row {row} ({_first_line(error)}): make it "
                "again") from None


# ----- formats ----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def _named(path, reader):
    """The unpacked bytes of a file, with the errors of reading and unpacking named. Sets reader.packed."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the files in it, like {path}/*")
    if path.exists() and not path.is_file():  # every file is opened twice, first to find its format
        raise UserError(f"{path} is a pipe or a device: write its content to a file first")
    broken = [OSError, EOFError, zlib.error, lzma.LZMAError]
    try:
        with contextlib.ExitStack() as stack:
            file, reader.packed = stack.enter_context(open(path, "rb")), ""
            while packed := next((name for name, magic in PACKED.items() if re.match(magic, file.peek(10))),
                                 ""):
                if packed == "zst":
                    broken.append(_zst(path).ZstdError)
                unpack = {"gz": gzip.open, "xz": lzma.open, "bz2": bz2.open}.get(packed) or _zst(path).open
                file = io.BufferedReader(stack.enter_context(unpack(file, "rb")), CHUNK)
                reader.packed = packed
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; check the name, or name another") from None
    except tuple(broken) as error:
        system = getattr(error, "strerror", None)
        what = "cannot be read" if system or not reader.packed else f"broken {reader.packed} data"
        raise UserError(
            f"{path}: {what} ({system or _first_line(error)}): get the file again, or choose another"
        ) from None


def _zst(path):
    """The module of zstd: the standard library's from Python 3.14 on, otherwise its backport."""
    try:
        from compression import zstd
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise UserError(f"{path}: reading zst needs backports.zstd before Python 3.14: pip install "
                            "backports.zstd, or unpack it first") from None
    return zstd


def refuse_by_content(path: Path, head: bytes) -> None:
    """UserError for a format that is known but not read, and for binary data."""
    again = "extract its text, or choose other files"
    for magic, name in (REFUSED | REFUSED_BINARY if 0 in head else REFUSED).items():
        if head.startswith(magic):
            raise UserError(f"{path} is {name}: {again}")
    if head[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive: unpack it and name the files")
    if head[4:8] == b"ftyp":
        raise UserError(f"{path} is a film or sound file (MP4): {again}")
    zeros = [head[i::2].count(0) for i in (0, 1)]
    if sum(zeros):
        at = head.index(0)
        if max(zeros) > len(head) // 5 and min(zeros) < max(zeros) // 10:
            order = "LE" if zeros[1] > zeros[0] else "BE"
            raise UserError(
                f"{path} looks like UTF-16 text without a byte-order mark: convert it to UTF-8 (iconv -f "
                f"UTF-16{order} -t UTF-8)")
        raise UserError(f"{path} is binary data (a zero byte at byte {at}): {again}, or add --format text")


def refuse_by_name(path: Path, names: list[str], start: str) -> None:
    """UserError for files that are tables, markup or archives, judged by name and first characters."""
    if MARKUP.match(start):
        raise UserError(
            f"{path} is HTML or XML: extract its text, or add --format text to train on the markup")
    for name in names:
        if name in TABLES:
            raise UserError(f"{path} is a table ({name}): export the column as JSON lines, or add --format "
                            "text to train on it as it stands")
        if name == ".parquet":
            raise UserError(
                f"{path} is named .parquet and is none (those begin with PAR1): get the file again")


def json_format(path: Path, start: str, sure: bool) -> str | None:
    """"jsonl", "array", or None for plain text. sure: the name or the user says that it is JSON."""
    start = start.lstrip()
    if re.match(r'\[\s*(\{\s*"|"|\]\s*$)', start) or (sure and start.startswith("[")):
        return "array"
    line = start.partition("\n")[0].rstrip("\r")
    if not start.startswith("{"):
        return "jsonl" if sure else None
    try:
        json.loads(line)
        return "jsonl"
    except (ValueError, RecursionError):
        pass
    if re.match(r'\{\s*\n\s*"', start):
        raise UserError(f"{path} is one JSON object over several lines: write one object a line (jq -c .), "
                        "or add --format text")
    return "jsonl" if sure or re.match(r'\{\s*"', start) else None


# ----- text -------------------------------------------------------------------------------------------------

def split(chunks: Iterable[str], separator: str) -> Iterator[Iterator[str]]:
    """The documents between separators, each as an iterator over pieces.
    Line breaks around a document belong to none.

    An empty separator makes one document. The text counts as if it stood between line breaks, so that a
    separator at its beginning or end is one too; two separators may share a line break.
    """
    parts = _parts(chunks, separator)
    more = True
    while more:
        more = False

        def document():
            nonlocal more
            breaks, begun = 0, False
            for part in parts:
                if part is None:
                    more = True
                    return
                kept = part.rstrip("\n")
                if not begun:
                    kept = kept.lstrip("\n")
                if kept:
                    while begun and breaks:
                        some = min(breaks, CHUNK)
                        breaks -= some
                        yield "\n" * some
                    begun, breaks = True, 0
                    yield kept
                breaks += len(part) - len(part.rstrip("\n"))

        current = document()
        first = next(current, None)
        if first is not None:
            yield itertools.chain([first], current)
            for _ in current:  # what the caller left
                pass


def _parts(chunks, separator):
    """Pieces of text, None for each separator."""
    buffer, shared = "\n", len(separator) > 1 and separator[0] == separator[-1] == "\n"
    for chunk in itertools.chain(chunks, ["\n"]):
        buffer += chunk
        if not separator:
            yield buffer
            buffer = ""
            continue
        start = 0
        while (at := buffer.find(separator, start)) >= 0:
            yield buffer[start:at]
            yield None
            start = at + len(separator) - shared
        keep = max(start, len(buffer) - len(separator) + 1)
        yield buffer[start:keep]
        buffer = buffer[keep:]
    yield buffer


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of CHUNK characters."""
    return (text[i:i + CHUNK] for i in range(0, len(text), CHUNK))


def checked(text: str, where: str) -> str:
    """The text, if it can be written as UTF-8: JSON may hold half a surrogate pair."""
    half = HALF.search(text)  # not text.encode(), which would copy it
    if half:
        raise UserError(
            f"{where}: half a surrogate pair at character {half.start()}: mend or remove the record")
    return text


def _kind(value):
    return {
        type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list",
        dict: "an object", str: "a string"
    }[type(value)]


def _names(names):
    names = list(names)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none"


def _first_line(error):
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
