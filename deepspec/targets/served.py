"""A target that runs elsewhere: hidden states from a serving engine, for targets that do not fit one process.

The server is vLLM's with hidden-state extraction (``docs/serving.md`` has the command): a request for one token leaves
the prompt's hidden states in a file on a file system that both see. A server is not trusted with a path: files are read
and removed only inside the folder that the user states, through no link, and removed only when they held the prompt's
own tokens. Its layer ids are one higher than ours; the id ``num_layers`` is the last layer before the final norm, which
is applied here with the target's own module.

S sequence, L layers asked for, D hidden size.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deepspec.errors import TargetError
from deepspec.http import NoReply, check_url, request, without_password
from deepspec.targets.adaptor import find_norm
from deepspec.targets.capture import TargetOutput
from deepspec.targets.load import TargetEmbeddings, TargetSpec, load_spec, load_target_embeddings
from deepspec.targets.stored import open_stored

ATTEMPTS, PAUSE = 4, 0.5  # of a request, and the seconds before the second of them; doubled each time
POLL = 0.002  # seconds between two looks at a lock
REFUSALS = (400, 413, 422)  # statuses of a request that is wrong, whenever it is asked
HEADER = 1 << 20  # bytes that a file may have beyond its two tensors


def server_layers(layers: Sequence[int], spec: TargetSpec) -> list[int]:
    """The engine's ids of what a recipe reads: of ``layers`` (ours, -1 the embedding) and of the last layer.

    The final norm is computed here, from the last layer's.
    """
    return sorted({layer + 1 for layer in layers if layer < spec.num_layers} | {spec.num_layers})


class RequestRefused(TargetError):
    """A server says that the request itself is wrong."""


class Extraction:
    """One server that hands hidden states out through files.

    Args:
        url: of the server, such as ``http://127.0.0.1:8000``.
        target: what it serves; gives sizes, dtype and the final norm.
        layers: 0-based layers that the server was started for; see :func:`server_layers`.
        revision: of the target's hub id.
        timeout: seconds the server may take for one prompt.
        storage: the folder that the server writes its files to (its ``shared_storage_path``); no other is read.
        attempts: of a request.

    Raises:
        TargetError: no such layers, no storage stated, or a final norm that cannot be read alone.
    """

    def __init__(
        self, url: str, target: TargetEmbeddings, layers: Sequence[int], revision: str | None = None,
        timeout: float = 600.0, *, storage: str | Path | None, attempts: int = ATTEMPTS,
    ) -> None:  # fmt: skip
        check_url(url, "server", TargetError)
        self._url, self.timeout, self.attempts = url.rstrip("/"), timeout, attempts
        self.url = without_password(self._url)  # in messages
        if storage is None or not Path(storage).is_dir():
            remedy = "name the folder of its shared_storage_path: data.server_storage, or --server-storage"
            problem = "no folder is stated from which the server's files may be read and removed"
            problem = problem if storage is None else "no such folder to read the server's files from"
            raise TargetError(problem, file=self.url, key="data.server_storage", found=storage, remedy=remedy)
        self.storage, self.spec, self.dtype = Path(storage), target.spec, target.dtype
        self.spec.check_layers(layers)
        self._index = {layer: index for index, layer in enumerate(server_layers(layers, self.spec))}
        self._norm = load_final_norm(self.spec.path, self.dtype, revision)
        self._name = ""

    def connect(self) -> None:
        """Ask for the model's name.

        Raises:
            TargetError: no server that serves one.
        """
        reply = self._ask("GET", "/v1/models", None)
        try:
            self._name = str(reply["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise TargetError("no model is served there", file=self.url, found=reply) from None

    @torch.no_grad()
    def states(self, tokens: list[int], layers: Sequence[int]) -> TargetOutput:
        """Features [S, L*D] of ``layers`` and the normed last hidden state [S, D] of one prompt.

        Raises:
            TargetError: layers that the server does not give, a request that failed, or hidden states of other tokens.
        """
        normed = self.spec.num_layers
        unknown = [layer for layer in layers if layer != normed and layer + 1 not in self._index]
        if unknown:
            raise TargetError("the server does not give these layers", file=self.url, found=unknown,
                              remedy="start it for the recipe's layers")  # fmt: skip
        hidden = self._hidden_states(tokens)
        final = self._norm(hidden[:, self._index[normed]])
        chosen = [final if layer == normed else hidden[:, self._index[layer + 1]] for layer in layers]
        return TargetOutput(torch.cat(chosen, dim=-1) if chosen else hidden[:, 0, :0], final)

    def _hidden_states(self, tokens: list[int]) -> Tensor:
        """[S, layers of the server, D] of one prompt."""
        body = {"model": self._name, "prompt": tokens, "max_tokens": 1, "temperature": 0}
        reply = self._ask("POST", "/v1/completions", body)
        given = reply.get("kv_transfer_params")
        path = given.get("hidden_states_path") if isinstance(given, dict) else None
        if not isinstance(path, str) or not path:
            remedy = "start the server with hidden-state extraction: docs/serving.md has the command"
            raise TargetError("the server returns no hidden states", file=self.url, remedy=remedy)
        most = len(tokens) * (len(self._index) * self.spec.hidden_size * 4 + 8) + HEADER
        with stored_states(self.storage, path, self.timeout, most) as (found, remove):
            hidden = self._checked(found, tokens, path).to(self.dtype)
            remove()  # written for this reader alone; what is not the prompt's own stays
        return hidden

    def _checked(self, found: dict[str, Tensor], tokens: list[int], path: str) -> Tensor:
        if not {"hidden_states", "token_ids"} <= found.keys():
            wanted_keys = "hidden_states and token_ids"
            raise TargetError("not a file of hidden states", file=path, found=sorted(found)[:4], wanted=wanted_keys)
        hidden = found["hidden_states"]
        wanted = (len(tokens), len(self._index), self.spec.hidden_size)
        if found["token_ids"].tolist() != tokens:
            raise TargetError(
                "hidden states of other tokens", file=path, remedy="start the server without prefix caching"
            )
        if tuple(hidden.shape) != wanted:
            remedy = f"start the server for the layers {sorted(self._index)} (its ids)"
            raise TargetError("hidden states of another shape", file=path, found=tuple(hidden.shape), wanted=wanted,
                              remedy=remedy)  # fmt: skip
        if not (hidden.is_floating_point() and bool(hidden.isfinite().all())):
            found_type = hidden.dtype if not hidden.is_floating_point() else "NaN or inf"
            raise TargetError("hidden states must be finite floating-point numbers", file=path, found=found_type)
        return hidden

    def _ask(self, verb: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """One exchange; a busy or restarting server gets it again.

        Raises:
            TargetError: it refuses, or does not answer.
        """
        problem = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                reply = request(verb, self._url + path, self.timeout, body)
                if reply.status == 200:
                    return reply.json()
            except (NoReply, ValueError) as none:
                problem = none.problem if isinstance(none, NoReply) else str(none)
                continue
            problem = reply.summary
            if reply.status in REFUSALS:
                raise RequestRefused("the server refuses the request", file=self.url + path, found=problem,
                                     remedy="does it serve this target, for prompts of this length?")  # fmt: skip
            if 400 <= reply.status < 500 and reply.status != 429:
                break
        raise TargetError("the server does not answer", file=self.url + path, found=problem,
                          remedy="is it up, and does it serve this target?")  # fmt: skip


class ServedTarget(TargetEmbeddings):
    """Runs forward passes where a :class:`~deepspec.targets.Target` would, for the cache builder.

    Args:
        url: of the server; see :class:`Extraction`.
        path: the target's folder or hub id, for its embedding, head, final norm and digest.
        layers: 0-based layers that the server was started for.
        dtype: of embedding, head and hidden states.
        revision: of the hub id.
        timeout: seconds the server may take for one prompt.
        concurrency: prompts in flight.
        storage: the folder that the server writes its files to.

    Raises:
        TargetError: no such target, no server that serves it, or no storage stated.
    """

    def __init__(
        self, url: str, path: str | Path, layers: Sequence[int], dtype: torch.dtype = torch.bfloat16,
        revision: str | None = None, timeout: float = 600.0, concurrency: int = 8, *, storage: str | Path | None,
    ) -> None:  # fmt: skip
        load_spec(path, revision).check_layers(layers)
        loaded = load_target_embeddings(path, dtype, "cpu", revision)
        super().__init__(loaded.spec, loaded.embed_weight, loaded.head_weight)
        self._server = Extraction(url, loaded, layers, revision, timeout, storage=storage)
        self._server.connect()
        self._pool = ThreadPoolExecutor(concurrency)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        layers: Sequence[int],
        position_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        past_key_values: Any = None,
    ) -> TargetOutput:
        """The same as :meth:`Target.forward` of right-padded rows from position 0; padding comes back as zeros.

        Args:
            input_ids: [B, S] int64.
            layers: of those that the server was started for.
            position_ids: None, the engine counts itself.
            attention_mask: [B, S], ones and then zeros; None for full rows.
            past_key_values: None, the engine has its own cache.

        Returns:
            features [B, S, L*D] and the normed last hidden state [B, S, D].

        Raises:
            TargetError: see :meth:`Extraction.states`.
        """
        if position_ids is not None or past_key_values is not None or isinstance(attention_mask, dict):
            raise TargetError("a served target takes only complete prompts", found="positions, cache or special masks")
        B, S = input_ids.shape
        lengths = [S] * B if attention_mask is None else attention_mask.sum(dim=1).tolist()
        rows = [input_ids[row, : int(length)].tolist() for row, length in enumerate(lengths)]
        D = self.spec.hidden_size
        features = torch.zeros(B, S, len(layers) * D, dtype=self.dtype)
        last = torch.zeros(B, S, D, dtype=self.dtype)
        for row, made in enumerate(self._pool.map(lambda tokens: self._server.states(tokens, layers), rows)):
            features[row, : len(made.features)] = made.features
            last[row, : len(made.last_hidden)] = made.last_hidden
        return TargetOutput(features, last)


@contextmanager
def stored_states(storage: Path, path: str, timeout: float, most: int) -> Iterator[tuple[dict[str, Tensor], Any]]:
    """What the server wrote for one prompt, once it is complete: it holds a lock on ``PATH.lock`` while it writes.

    Every part of the path below ``storage`` is opened from the one above it and follows no link, so that what is read
    and removed is what was checked.

    Args:
        storage: the folder that files may lie in, however deep.
        path: as the server names it, absolute.
        timeout: seconds to wait for the lock.
        most: bytes of the file.

    Yields:
        The tensors, and a function that removes the file and its lock.

    Raises:
        TargetError: a path that leads elsewhere, no such file here, one that is broken or larger than ``most``, or one
            that is not complete after ``timeout`` seconds.
    """
    *folders, name = _below(storage, path)
    with ExitStack() as stack:
        try:
            place = _open(stack, storage, os.O_DIRECTORY)
            for one in folders:
                place = _open(stack, one, os.O_DIRECTORY | os.O_NOFOLLOW, place)
            lock, file = f"{name}.lock", os.O_NOFOLLOW | os.O_NONBLOCK  # opening a pipe would wait for its writer
            handle = _open(stack, lock, file, place)
            _refuse_special(handle, path)
            _wait_for(handle, path, timeout)
            handle = _open(stack, name, file, place)
        except OSError as problem:
            raise _not_there(problem, path) from None
        size = _refuse_special(handle, path)
        if size > most:
            raise TargetError("a larger file than the prompt's hidden states", file=path, found=f"{size} bytes",
                              wanted=f"at most {most}")  # fmt: skip
        try:
            found = load_file(f"/proc/self/fd/{handle}")
        except (SafetensorError, OSError) as problem:
            raise TargetError(f"not a safetensors file ({problem})", file=path) from None

        def remove() -> None:
            for done in (name, lock):
                with suppress(FileNotFoundError):
                    os.unlink(done, dir_fd=place)

        yield found, remove


def _below(storage: Path, path: str) -> tuple[str, ...]:
    """The parts of ``path`` below the folder, which the server may name with its links resolved."""
    for folder in (os.path.abspath(storage), os.path.realpath(storage)):
        if path.startswith(f"{folder.rstrip('/')}/") and path.isprintable():
            parts = path[len(folder.rstrip("/")) + 1 :].split("/")
            if not {"", ".", ".."} & set(parts):
                return tuple(parts)
    remedy = "state the server's shared_storage_path, as an absolute path on both sides"
    raise TargetError("the server names a file outside its folder, which is neither read nor removed", file=path,
                      key="data.server_storage", wanted=f"a file below {storage}", remedy=remedy)  # fmt: skip


def _open(stack: ExitStack, name: str | Path, flags: int, place: int | None = None) -> int:
    handle = os.open(name, flags | os.O_RDONLY | os.O_CLOEXEC, dir_fd=place)
    stack.callback(os.close, handle)
    return handle


def _refuse_special(handle: int, path: str) -> int:
    """Bytes of an open file.

    Raises:
        TargetError: it is a folder, a pipe or a device.
    """
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        raise TargetError("not a file of the server's own", file=path, found="a folder, a pipe or a device")
    return found.st_size


def _not_there(problem: OSError, path: str) -> TargetError:
    if problem.errno in (errno.ELOOP, errno.ENOTDIR):  # a link where none is followed
        return TargetError("not a file of the server's own", file=path, found="a link in its path")
    remedy = "server and reader must see one file system under one name (shared_storage_path)"
    if problem.errno == errno.ENOENT:
        return TargetError("no such file", file=path, remedy=remedy)
    return TargetError(f"cannot be read ({problem.strerror})", file=path, remedy=remedy)


def _wait_for(handle: int, path: str, timeout: float) -> None:
    """Take the shared lock; polled: a thread blocked in the kernel could not be stopped at the timeout."""
    end = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise TargetError("the server does not finish it", file=path, found=f"{timeout:g} s") from None
            time.sleep(POLL)


def load_final_norm(path: str | Path, dtype: torch.dtype, revision: str | None = None) -> nn.Module:
    """The target's own final norm, without its layers.

    Raises:
        TargetError: the target is quantized, not stored as safetensors, or not complete.
    """
    stored = open_stored(path, dtype, revision)
    if stored is None:
        raise TargetError("its final norm cannot be read alone", file=path,
                          remedy="serve a target with safetensors files")  # fmt: skip
    norm = find_norm(stored.model)
    name = stored.name_of(norm)
    norm.load_state_dict({key: stored.read(f"{name}.{key}") for key in norm.state_dict()}, assign=True)
    return norm.eval().requires_grad_(False)
