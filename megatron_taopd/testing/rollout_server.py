"""A real HTTP server on this machine that answers prompts with a small HF model, as vLLM and as SGLang do.

It is what tests and examples run in the place of those two, which need GPUs: transformers computes, a response after
another. ``python -m megatron_taopd.testing.rollout_server DIRECTORY --port 30000`` starts one by hand.
"""

from __future__ import annotations

import argparse
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import torch

Json = dict[str, Any]
Fault = Literal["busy", "moved", "reset", "torn", "silent"] | Callable[[Json], Json]
"""Instead of an answer: status 503, a redirection to ``elsewhere``, a lost connection, a half answer, none for a while;
or an answer changed on its way."""


class RefusedError(Exception):
    """A request that is answered with status 400."""


class RolloutServer:
    """Serves ``/v1/completions``, ``/collective_rpc`` and ``/reset_prefix_cache`` (vLLM), ``/generate`` and
    ``/update_weights_from_disk`` (SGLang) on 127.0.0.1 while a ``with`` block runs."""

    def __init__(self, directory: str | Path, *, port: int = 0, api_key: str | None = None) -> None:
        """Load the model; its ``eos_token_id`` ends responses.

        Args:
            port: 0 takes a free one.
            api_key: requests without it are answered with status 401.
        """
        self.api_key = api_key
        self.weight_version = "default"
        self.seconds_per_answer = 0.0
        """To make answers slower than they are."""
        self.faults: list[Fault] = []
        """Taken one by one by the next requests for a response."""
        self.elsewhere = ""
        self.update_faults: list[Fault] = []
        """The same, by requests to load weights."""
        self.paths: list[str] = []
        """Of all requests, in order of arrival."""
        self.in_flight = self.most_in_flight = 0
        self.silence = threading.Event()
        self._lock = threading.Lock()
        self._computing = threading.Lock()
        self._load(str(directory))
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._http.daemon_threads = True

    @property
    def url(self) -> str:
        """Root of the server."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> RolloutServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.silence.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, path: str, body: Json) -> tuple[Json, Fault | None]:
        """What a request is answered, and what happens to the answer."""
        with self._lock:
            self.paths.append(path)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            loads = path in ("/collective_rpc", "/update_weights_from_disk")
            faults = self.update_faults if loads else self.faults
            with self._lock:
                fault = faults.pop(0) if faults else None
            if isinstance(fault, str):
                return {}, fault
            time.sleep(self.seconds_per_answer)
            return _ROUTES[path](self, body), fault
        finally:
            with self._lock:
                self.in_flight -= 1

    def completions(self, body: Json) -> Json:
        """vLLM's."""
        tokens, logprobs, stopped = self._respond(
            body["prompt"], body["max_tokens"], body["temperature"], body["seed"], body["stop_token_ids"]
        )
        choice = {
            "index": 0,
            "text": "",
            "finish_reason": "stop" if stopped else "length",
            "token_ids": tokens if body.get("return_token_ids") else None,
            "prompt_token_ids": body["prompt"] if body.get("return_token_ids") else None,
            "logprobs": {"token_logprobs": logprobs} if body.get("logprobs") is not None else None,
        }
        return {"object": "text_completion", "model": self.directory, "choices": [choice]}

    def generate(self, body: Json) -> Json:
        """SGLang's."""
        sampling = body["sampling_params"]
        tokens, logprobs, stopped = self._respond(
            body["input_ids"],
            sampling["max_new_tokens"],
            sampling["temperature"],
            sampling["sampling_seed"],
            sampling["stop_token_ids"],
        )
        meta: Json = {
            "finish_reason": {"type": "stop", "matched": tokens[-1]} if stopped else {"type": "length"},
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": len(tokens),
            "weight_version": self.weight_version,
        }
        if body.get("return_logprob"):
            meta["output_token_logprobs"] = [[p, t, None] for p, t in zip(logprobs, tokens, strict=True)]
        return {"text": "", "output_ids": tokens, "meta_info": meta}

    def collective_rpc(self, body: Json) -> Json:
        """vLLM's, of which ``reload_weights`` is known."""
        if body["method"] != "reload_weights":
            raise RefusedError(f"unknown method {body['method']!r}")
        self._load(body["kwargs"]["weights_path"])
        return {"results": [None]}

    def reset_prefix_cache(self, body: Json) -> Json:
        """vLLM's; there is no cache."""
        return {}

    def update_weights_from_disk(self, body: Json) -> Json:
        """SGLang's."""
        self._load(body["model_path"])
        self.weight_version = body.get("weight_version") or self.weight_version
        return {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}

    def _load(self, directory: str) -> None:
        from transformers import AutoModelForCausalLM

        if not Path(directory, "config.json").exists():
            raise RefusedError(f"{directory} is no model directory")
        with self._computing:
            self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.directory = directory
        ends = self.model.generation_config.eos_token_id
        self.stop_tokens = {ends} if isinstance(ends, int) else set(ends or [])

    @torch.no_grad()
    def _respond(
        self, prompt: list[int], max_tokens: int, temperature: float, seed: int, stop_tokens: list[int]
    ) -> tuple[list[int], list[float], bool]:
        """Tokens, their log-probabilities at the temperature (at 1 for temperature 0), and whether they end by
        themselves."""
        generator = torch.Generator().manual_seed(seed)
        tokens: list[int] = []
        logprobs: list[float] = []
        with self._computing:
            fed, cache = torch.tensor([prompt]), None
            while len(tokens) < max_tokens:
                out = self.model(input_ids=fed, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                log_p = (out.logits[0, -1].float() / (temperature or 1.0)).log_softmax(-1)
                token = int(log_p.argmax())
                if temperature > 0:
                    token = int(torch.multinomial(log_p.exp(), 1, generator=generator))
                tokens.append(token)
                logprobs.append(float(log_p[token]))
                if token in self.stop_tokens or token in stop_tokens:
                    return tokens, logprobs, True
                fed = torch.tensor([[token]])
        return tokens, logprobs, False


_ROUTES: dict[str, Callable[[RolloutServer, Json], Json]] = {
    "/v1/completions": RolloutServer.completions,
    "/collective_rpc": RolloutServer.collective_rpc,
    "/reset_prefix_cache": RolloutServer.reset_prefix_cache,
    "/generate": RolloutServer.generate,
    "/update_weights_from_disk": RolloutServer.update_weights_from_disk,
}


class _Handler(BaseHTTPRequestHandler):
    owner: RolloutServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self.owner.api_key is not None and self.headers.get("Authorization") != f"Bearer {self.owner.api_key}":
            return self._send(401, {"error": "Unauthorized"})
        if self.path not in _ROUTES:
            return self._send(404, {"detail": "Not Found"})
        try:
            answer, fault = self.owner.answer(self.path, body)
        except RefusedError as error:
            return self._send(400, {"success": False, "message": str(error)})
        if fault == "busy":
            self._send(503, {"error": "busy"})
        elif fault == "moved":
            self._send(307, {}, location=self.owner.elsewhere + self.path)
        elif fault == "reset":
            self._reset()
        elif fault == "torn":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self._reset()
        elif fault == "silent":
            self.owner.silence.wait(30)
        else:
            self._send(200, fault(answer) if callable(fault) else answer)

    def _reset(self) -> None:
        self.wfile.flush()
        # A connection that is closed without lingering is reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()
        self.connection.close()

    def _send(self, status: int, body: Json, *, location: str | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if location is not None:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", help="HF directory of a small model")
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    with RolloutServer(given.directory, port=given.port) as server:
        print(f"serving {given.directory} at {server.url}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
