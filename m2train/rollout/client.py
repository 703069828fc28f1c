"""HTTP client of one vLLM server: token ids in, token ids, log-probs and weight versions out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from m2train.errors import RunError
from m2train.records import Generation, VersionSpan

GENERATE_ROUTE = "/inference/v1/generate"
ABANDONED = "abandoned-update"
"""Version of weights after an update that was not seen through."""
_SHORT_TIMEOUT_S = 10.0


class EngineError(RunError):
    """An engine cannot serve this run; the message is one line with the cause and what to do."""


class EngineLost(EngineError):
    """No usable answer (connection lost, server error): the same request may succeed after a restart."""


class EngineClient:
    """One server. Every method raises `EngineLost` for what a restart may cure and `EngineError` for the rest.

    Args:
        url: base URL, without a path.
        timeout_s: longest wait for one generation or one weight update.
        stop_token_ids: ids that end a reply besides the model's own end-of-sequence.
    """

    def __init__(self, url: str, timeout_s: float, stop_token_ids: Sequence[int] = ()) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._stop = sorted(set(stop_token_ids))
        self._model = ""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        wait = httpx.Timeout(timeout_s, connect=_SHORT_TIMEOUT_S)
        self._http = httpx.AsyncClient(base_url=self.url, limits=limits, timeout=wait, trust_env=False)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def healthy(self) -> bool:
        """Whether the server and its engine answer now."""
        try:
            return (await self._http.get("/health", timeout=_SHORT_TIMEOUT_S)).status_code == 200
        except httpx.HTTPError:
            return False

    async def check(self, longest_request: int) -> None:
        """Refuse a server that was started without what training needs, naming the flag to add.

        Args:
            longest_request: tokens of the longest prompt and reply that will be asked for.

        Raises:
            EngineError: token route, weight routes, weight versions of tokens or processed log-probs are missing, or
                requests may be longer than the server takes.
        """
        card = (await self.call("GET", "/v1/models"))["data"][0]
        self._model, room = card["id"], card.get("max_model_len")
        if room is not None and room < longest_request:  # who is not vLLM says none, and fails below
            raise EngineError(
                f"{self.url} takes {room} tokens a request; rollout.max_context_tokens + algo.max_new_tokens = "
                f"{longest_request}: start it with --max-model-len {longest_request}, or lower one of the two"
            )
        await self.weight_version()
        # top_k = 1 leaves one token: its log-prob is 0 if filters are part of the distribution, else below 0.
        answer = await self._generate([0], {"max_tokens": 1, "temperature": 1.0, "top_k": 1, "logprobs": 0})
        if not answer.weight_versions:
            raise EngineError(
                f"{self.url} does not say which weights its tokens come from (weight_versions of {GENERATE_ROUTE}); "
                "without that no one can tell whether a reply is the policy's; start it with a vLLM whose "
                "token route reports them (0.32 does)"
            )
        if abs(answer.logprobs[0]) > 1e-6:
            raise EngineError(
                f"{self.url} returns raw log-probs; training needs those of the sampled distribution; "
                "start the server with --logprobs-mode processed_logprobs"
            )

    async def generate(
        self, prompt_ids: Sequence[int], *, max_tokens: int, temperature: float, top_p: float, seed: int
    ) -> Generation:
        """Sample one continuation (temperature 0: greedy)."""
        sampling = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "logprobs": 0,
        }
        return await self._generate(prompt_ids, sampling)

    async def _generate(self, prompt_ids: Sequence[int], sampling: dict[str, Any]) -> Generation:
        sampling = {**sampling, "stop_token_ids": self._stop, "detokenize": False}
        body = {"model": self._model, "token_ids": list(prompt_ids), "sampling_params": sampling}
        choice = (await self.call("POST", GENERATE_ROUTE, json=body))["choices"][0]
        reason = choice["finish_reason"]
        if reason not in ("stop", "length"):
            raise EngineLost(f"{self.url} ended a generation with {reason!r}; expected stop or length")
        return Generation(
            token_ids=choice["token_ids"],
            logprobs=[entry["logprob"] for entry in choice["logprobs"]["content"]],
            finish_reason=reason,
            weight_versions=[VersionSpan(**span) for span in choice.get("weight_versions") or []],
            seed=sampling.get("seed", 0),
        )

    async def weight_version(self) -> str:
        """The version the engine reports for its weights."""
        return str((await self.call("GET", "/weight_info"))["weight_version"])

    async def set_weight_version(self, version: str) -> None:
        """Name the weights that the server started with."""
        await self.call("POST", "/update_weight_version", json={"new_version": version})

    async def end_abandoned_update(self) -> bool:
        """Close a weight update that somebody opened and left: the server takes no other one until then, and layers
        that were given nothing are empty. They get back what they held.

        Returns:
            Whether there was one; the weights, of which update whatever has come, are then called `ABANDONED`.
        """
        try:
            # vLLM's server drops the connection after the error that a refusal is; it must not be used again.
            close = {"Connection": "close"}
            await self.call("POST", "/finish_weight_update", json={"weight_version": ABANDONED}, headers=close)
        except EngineLost:  # refused, as a rule; a server that is gone is noticed by the next call
            return False
        return True

    async def call(self, method: str, path: str, **kwargs: Any) -> Any:
        """One HTTP call; the decoded JSON answer.

        Raises:
            EngineLost: no connection, a 5xx answer, or a time-out of a server that is not healthy either.
            EngineError: time-out of a healthy server, missing route, refused request.
        """
        try:
            answer = await self._http.request(method, path, **kwargs)
        except httpx.ConnectTimeout as err:  # its host is gone
            raise EngineLost(f"{self.url}{path}: no connection within {_SHORT_TIMEOUT_S:g} s") from err
        except httpx.TimeoutException as err:
            if not await self.healthy():
                raise EngineLost(
                    f"{self.url}{path} did not answer in {self._timeout_s:g} s, nor does /health"
                ) from err
            raise EngineError(
                f"{self.url}{path} did not answer in {self._timeout_s:g} s; raise rollout.request_timeout_s or "
                "lower rollout.concurrency"
            ) from err
        except httpx.HTTPError as err:
            raise EngineLost(f"{self.url}{path}: {type(err).__name__}: {err}") from err
        if answer.status_code in (403, 404, 405, 501):
            raise EngineError(_missing_route(self.url, path, answer.status_code))
        if answer.is_server_error:
            raise EngineLost(f"{self.url}{path}: HTTP {answer.status_code}: {_detail(answer)}")
        if answer.is_error:
            raise EngineError(f"{self.url}{path}: HTTP {answer.status_code}: {_detail(answer)}")
        return answer.json() if answer.content else {}


def _missing_route(url: str, path: str, status: int) -> str:
    if path == GENERATE_ROUTE:
        flag = "start it with --enable-scale-out (vLLM 0.29 or newer)"
    elif path.startswith("/v1/"):
        flag = "this is not vLLM's OpenAI server"
    else:
        flag = "start it with the environment variable VLLM_SERVER_DEV_MODE=1"
    return f"{url} has no route {path} (HTTP {status}); {flag}"


def _detail(answer: httpx.Response) -> str:
    try:
        body = answer.json()
        error = body.get("error", body)
        text = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        text = answer.text
    return " ".join(str(text).split())[:300]
