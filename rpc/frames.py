"""A session's frames on the wire: numbered (S1), and cut into pieces when longer than S5 allows."""

from collections.abc import Iterator
from typing import TypeVar

from contracts.errors import InvalidRequest
from rpc.pb import worker_pb2 as pb
from rpc.wire import MAX_FRAME_BYTES, MAX_MESSAGE_BYTES

Frame = TypeVar("Frame", pb.RouterFrame, pb.WorkerFrame)

# Room in each frame for its number, its load and a piece's own header.
FRAME_PAYLOAD_BYTES = MAX_FRAME_BYTES - 256


class FrameWriter:
    """Numbers the frames of one direction, in the order in which they are written."""

    def __init__(self) -> None:
        self._next = 0

    def numbered(self, frame: Frame) -> Iterator[Frame]:
        """The frame itself, or the frames that carry its pieces; each gets its number."""
        if frame.ByteSize() <= MAX_FRAME_BYTES:
            yield self._number(frame)
            return
        data = frame.SerializeToString()
        for start in range(0, len(data), FRAME_PAYLOAD_BYTES):
            end = start + FRAME_PAYLOAD_BYTES
            yield self._number(type(frame)(piece=data[start:end], more_pieces=end < len(data)))

    def _number(self, frame: Frame) -> Frame:
        frame.sequence = self._next
        self._next += 1
        return frame


class FrameReader:
    """Checks the numbers of one direction and puts pieces together."""

    def __init__(self) -> None:
        self._next = 0
        self._pieces = bytearray()

    def accept(self, frame: Frame) -> Frame | None:
        """The frame, the whole one that its last piece completes, or None: more pieces to come.

        Raises:
            InvalidRequest: a number is missing or repeated, or the pieces are no frame.
        """
        if frame.sequence != self._next:
            raise InvalidRequest(f"frame {frame.sequence} arrived where {self._next} was due")
        self._next += 1
        if not frame.piece:
            if self._pieces:
                raise InvalidRequest("a frame arrived between the pieces of another")
            return frame
        if len(self._pieces) + len(frame.piece) > MAX_MESSAGE_BYTES:
            raise InvalidRequest(f"a frame is longer than {MAX_MESSAGE_BYTES} bytes")
        self._pieces += frame.piece
        if frame.more_pieces:
            return None
        data, self._pieces = bytes(self._pieces), bytearray()
        try:
            return type(frame).FromString(data)
        except Exception as error:  # protobuf's DecodeError has no stable home
            raise InvalidRequest(f"the pieces are no frame: {error}") from None
