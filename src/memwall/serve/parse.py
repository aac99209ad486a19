"""Bodies of `/v1/completions`, `/v1/chat/completions` and `/v1/embeddings` as checked requests for the engine."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from memwall.engine.call_forms import TAGGED, CallForm
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Request
from memwall.errors import InputError
from memwall.models.chat import ChatTemplate
from memwall.models.tokenizer import Tokenizer
from memwall.serve.call_probe import form_of_template
from memwall.serve.calls import Calls
from memwall.serve.fields import ApiError, Fields
from memwall.serve.messages import read_messages, with_tools_as_text
from memwall.serve.settings import ServerSettings
from memwall.serve.tools import Tools, read_tools

if TYPE_CHECKING:
    from memwall.engine.adapters import Adapters
    from memwall.engine.guide import Guide, TokenTable

IGNORED = ("metadata", "store", "service_tier", "safety_identifier")
SHARED = (
    "model", "stream", "stream_options", "n", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "logprobs",
    "frequency_penalty", "presence_penalty", "logit_bias", "ignore_eos", "priority", "cache_salt", "user",
    "prompt_cache_key", "return_token_ids", "response_format", *IGNORED,
)  # fmt: skip
COMPLETION = (*SHARED, "prompt", "echo", "best_of", "suffix")
CHAT = (
    *SHARED, "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice",
    "functions", "modalities", "parallel_tool_calls",
)  # fmt: skip
EMBEDDING = ("model", "input", "encoding_format", "dimensions", "user", "priority", *IGNORED)
TOKENIZE = ("model", "prompt", "messages", "add_special_tokens")
DETOKENIZE = ("model", "tokens")
LARGEST_SEED = (1 << 63) - 1
MOST_PENALTY = 2.0
MOST_BIAS = 100.0
MOST_BIASED = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a body asks for. model: as it was named. requests: one per choice, those of one prompt in a row; stop: texts
    that end a choice. token_ids: the answer tells ids of its tokens (a parameter of vLLM's). calls: what tools the
    answers may call, and how; None for none.
    """

    model: str
    requests: tuple[Request, ...]
    choices: int
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    echo: tuple[str, ...] = ()
    token_ids: bool = False
    calls: Calls | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once."""
        return sum(len(request.prompt) for request in self.requests[:: self.choices])


class Parser:
    """Reads bodies for one model."""

    def __init__(
        self,
        settings: ServerSettings,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        context: int,
        vocab: int,
        adapters: Adapters | None = None,
        width: int = 0,
        eos: Sequence[int] = (),
    ) -> None:
        """adapters: served as models beside the base. width: numbers of an embedding; 0 where none are made. eos:
        tokens that end a text.
        """
        self.settings = settings
        self.tokenizer = tokenizer
        self.template = template
        self.context = context
        self.vocab = vocab
        self.adapters = adapters
        self.width = width
        self.eos = tuple(eos)
        self._table: TokenTable | None = None
        self.call_form: CallForm | None = form_of_template(template)
        """What the model's own template teaches; None where it knows no tools."""

    def completion(self, body: dict[str, Any]) -> Asked:
        """A body of `/v1/completions`."""
        fields = Fields(body, COMPLETION)
        fields.neutral("suffix", "")
        model = self._model(fields)
        choices = fields.integer("n", 1, 1, self.settings.most_choices)
        fields.neutral("best_of", choices)
        prompts = self._prompts(fields.get("prompt"))
        logprobs = fields.get("logprobs")
        if logprobs is not None:
            logprobs = fields.integer("logprobs", 0, 0, self.settings.most_logprobs)
        echo = fields.boolean("echo")
        if echo and logprobs is not None:
            raise ApiError("echo and logprobs together are not supported; leave one out", param="echo")
        texts = tuple(self.tokenizer.decode(prompt) for prompt in prompts) if echo else ()
        return self._asked(fields, model, prompts, 16, "max_tokens", choices, logprobs, (), texts)

    def chat(self, body: dict[str, Any]) -> Asked:
        """A body of `/v1/chat/completions`."""
        fields = Fields(body, CHAT)
        fields.neutral("functions", [])
        fields.neutral("modalities", ["text"])
        model, tools = self._model(fields), read_tools(fields)
        prompt = self._conversation(fields, tools)
        wants = fields.boolean("logprobs")
        top = fields.integer("top_logprobs", 0, 0, self.settings.most_logprobs)
        if top and not wants:
            raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
        limit = "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"
        choices = fields.integer("n", 1, 1, self.settings.most_choices)
        return self._asked(
            fields, model, [prompt], None, limit, choices, top if wants else None, self.template.stop, (), tools
        )

    def _conversation(self, fields: Fields, tools: Tools | None) -> list[int]:
        """The prompt of a chat; with the opening of a call where there must be one."""
        messages, offered = read_messages(fields.get("messages")), tools.offered if tools is not None else ()
        if self.call_form is None:
            messages, told = with_tools_as_text(messages, offered), None
        else:
            told = list(offered) or None
        try:
            text = self.template.render(messages, tools=told)
            if tools is not None and tools.must:
                text += (self.call_form or TAGGED).opening
            return self.tokenizer.encode(text, add_bos=False)
        except InputError as error:
            raise ApiError(str(error), param="messages") from None

    def embedding(self, body: dict[str, Any]) -> tuple[Asked, bool]:
        """A body of `/v1/embeddings`, and whether its vectors are wanted in base64."""
        fields = Fields(body, EMBEDDING)
        model = self._model(fields)
        coding = fields.text("encoding_format", "float")
        if coding not in ("float", "base64"):
            raise ApiError("encoding_format must be float or base64", param="encoding_format")
        fields.integer("dimensions", self.width, self.width, self.width)
        priority, user = fields.integer("priority", 0, -(1 << 31), 1 << 31), fields.text("user")
        prompts = self._prompts(fields.get("input"), "input")
        self._room(prompts, "input")
        requests = tuple(
            Request(
                prompt=tuple(prompt),
                sampling=Sampling(max_new_tokens=1),
                adapter=model[1],
                priority=priority,
                user=user,
                pooling=self.settings.pooling,
                salt=secrets.token_bytes(16) if self.settings.pooling == "mean" else b"",
            )
            for prompt in prompts
        )
        return Asked(
            model=model[0], requests=requests, choices=1, stop=(), stream=False, usage=False
        ), coding == "base64"

    def tokens(self, body: dict[str, Any]) -> list[int]:
        """Ids of a body of `/tokenize`: `prompt`, or `messages` through the template."""
        fields = Fields(body, TOKENIZE)
        self._model(fields)
        special, text = fields.boolean("add_special_tokens", True), fields.text("prompt")
        try:
            if fields.get("messages") is not None:
                return self.tokenizer.encode(self.template.render(read_messages(fields.get("messages"))), add_bos=False)
            if text is None:
                raise ApiError("prompt is missing: give a text, or messages", param="prompt")
            return self.tokenizer.encode(text, add_bos=None if special else False)
        except InputError as error:
            raise ApiError(str(error), param="prompt") from None

    def text(self, body: dict[str, Any]) -> str:
        """Text of a body of `/detokenize`: `tokens`."""
        fields = Fields(body, DETOKENIZE)
        self._model(fields)
        return self.tokenizer.decode(self._ids(fields.get("tokens"), "tokens"), False)

    def _model(self, fields: Fields) -> tuple[str, str | None]:
        """The model's name, and the key of its adapter; None for the base."""
        name = fields.text("model")
        if name is None or name == self.settings.name:
            return self.settings.name, None
        key = self.adapters.key_of(name) if self.adapters is not None else None
        if key is None:
            others = f" and {len(self.adapters.names):,} adapters" if self.adapters is not None else ""
            message = f"the model {name[:80]!r} is not here; this server has {self.settings.name!r}{others}"
            raise ApiError(message, status=404, param="model", code="model_not_found")
        return name, key

    def _prompts(self, prompt: Any, param: str = "prompt") -> list[list[int]]:
        if prompt is None:
            raise ApiError(f"{param} is missing: give a text, a list of texts, or token ids", param=param)
        if isinstance(prompt, str):
            return [self._encode(prompt, param)]
        if not isinstance(prompt, list) or not prompt:
            raise ApiError(f"{param} must be a text, a list of texts, or token ids, and not empty", param=param)
        if all(isinstance(one, str) for one in prompt) or all(isinstance(one, list) for one in prompt):
            if len(prompt) > self.settings.most_prompts:
                message = f"{len(prompt)} prompts in one request; at most {self.settings.most_prompts}"
                raise ApiError(message, param=param)
            return [self._encode(one, param) if isinstance(one, str) else self._ids(one, param) for one in prompt]
        return [self._ids(prompt, param)]

    def _encode(self, text: str, param: str) -> list[int]:
        try:
            ids = self.tokenizer.encode(text)
        except InputError as error:
            raise ApiError(str(error), param=param) from None
        if not ids:
            raise ApiError(f"{param} is empty; give at least one word", param=param)
        return ids

    def _ids(self, ids: Any, param: str) -> list[int]:
        if not isinstance(ids, list) or not ids:
            raise ApiError(f"{param} must be token ids, at least one", param=param)
        for one in ids:
            if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < self.vocab:
                raise ApiError(f"token ids are whole numbers from 0 to {self.vocab - 1}", param=param)
        return ids

    def _room(self, prompts: list[list[int]], param: str) -> tuple[int, int]:
        """Tokens of the longest prompt, and what the context leaves beside it."""
        longest = max(len(prompt) for prompt in prompts)
        if longest >= self.context:
            message = f"the {param} has {longest:,} tokens, but the context is {self.context:,}; shorten it"
            raise ApiError(message, code="context_length_exceeded", param=param)
        return longest, self.context - longest

    def _asked(
        self,
        fields: Fields,
        model: tuple[str, str | None],
        prompts: list[list[int]],
        default_new: int | None,
        limit: str,
        choices: int,
        logprobs: int | None,
        stop: tuple[str, ...],
        echo: tuple[str, ...],
        tools: Tools | None = None,
    ) -> Asked:
        longest, left = self._room(prompts, "prompt")
        new = fields.integer(limit, left if default_new is None else min(default_new, left), 1, 1 << 31)
        if new > left:
            message = f"{limit} is {new:,}, but a prompt of {longest:,} tokens leaves {left:,} of {self.context:,}"
            raise ApiError(message, code="context_length_exceeded", param=limit)
        sampling = self._sampling(fields, new)
        calls, guide = self._calls(tools), self._guide(fields, tools)
        salt = (fields.text("cache_salt") or "").encode("utf-8", "surrogatepass")
        priority = fields.integer("priority", 0, -(1 << 31), 1 << 31)
        user, session = fields.text("user"), fields.text("prompt_cache_key")
        requests = []
        for prompt in prompts:
            for choice in range(choices):
                own = replace(sampling, seed=(sampling.seed + choice) % LARGEST_SEED)
                requests.append(
                    Request(
                        prompt=tuple(prompt),
                        sampling=own,
                        logprobs=logprobs,
                        adapter=model[1],
                        salt=salt,
                        priority=priority,
                        user=user,
                        session=session,
                        guide=guide,
                    )
                )
        return Asked(
            model=model[0],
            requests=tuple(requests),
            choices=choices,
            stop=(*self._stops(fields.get("stop")), *stop),
            stream=fields.boolean("stream"),
            usage=_usage(fields),
            echo=echo,
            token_ids=fields.boolean("return_token_ids"),
            calls=calls,
        )

    def _sampling(self, fields: Fields, new: int) -> Sampling:
        temperature = fields.number("temperature", 1.0, 0.0, 2.0)
        top_p = fields.number("top_p", 1.0, 0.0, 1.0)
        return Sampling(
            max_new_tokens=new,
            temperature=temperature,
            top_p=max(top_p, 1e-9),
            top_k=fields.integer("top_k", 0, 0, 1 << 31),
            seed=fields.integer("seed", secrets.randbelow(LARGEST_SEED), 0, LARGEST_SEED),
            ignore_eos=fields.boolean("ignore_eos"),
            frequency_penalty=fields.number("frequency_penalty", 0.0, -MOST_PENALTY, MOST_PENALTY),
            presence_penalty=fields.number("presence_penalty", 0.0, -MOST_PENALTY, MOST_PENALTY),
            bias=self._bias(fields.get("logit_bias")),
        )

    def _bias(self, bias: Any) -> tuple[tuple[int, float], ...]:
        """What `logit_bias` adds, by token id."""
        if bias is None:
            return ()
        if not isinstance(bias, dict) or len(bias) > MOST_BIASED:
            raise ApiError(f"logit_bias must be an object of at most {MOST_BIASED} token ids", param="logit_bias")
        values = Fields(bias, bias)
        for token in bias:
            if (
                not token.isascii()
                or not token.isdigit()
                or len(token) > len(str(self.vocab))
                or int(token) >= self.vocab
            ):
                message = f"logit_bias: {token[:40]!r} is no token id from 0 to {self.vocab - 1}"
                raise ApiError(message, param="logit_bias")
        return tuple((int(token), values.number(token, 0.0, -MOST_BIAS, MOST_BIAS)) for token in bias)

    def _calls(self, tools: Tools | None) -> Calls | None:
        if tools is None:
            return None
        form = self.call_form or TAGGED
        token = self.tokenizer.token_to_id(form.marker) if form.marker else None
        special = token if token is not None and self.tokenizer.is_special(token) else None
        most = None if tools.parallel else 1
        return Calls(form=form, names=tools.names, begun=bool(tools.must), marker_token=special, most=most)

    def _guide(self, fields: Fields, tools: Tools | None) -> Guide | None:
        """The form that `response_format` and `tool_choice` ask for."""
        spec, param = _value_spec(fields.get("response_format")), "response_format"
        if not spec and (tools is None or not tools.must):
            return None
        # whoever asks for no form needs none of it
        from memwall.engine.call_grammar import CallRules, calls_spec, form_walker
        from memwall.engine.guide import Guide, TokenTable

        if tools is not None:
            form, opened = self.call_form or TAGGED, bool(tools.must)
            rules = CallRules(form=form, tools=tools.schemas(), most=tools.most, opened=opened)
            spec, param = {**({} if opened else spec), "calls": calls_spec(rules)}, "tools"
        if not self.eos:
            message = f"{param} needs a model with an end-of-text token"
            raise ApiError(message, param=param, code="unsupported_parameter")
        if fields.boolean("ignore_eos"):
            raise ApiError("an answer in a form ends, which ignore_eos forbids; leave one out", param="ignore_eos")
        if self._table is None:
            self._table = TokenTable(self.tokenizer, self.vocab, self.eos)
        try:
            return Guide(form_walker(spec), self._table, json.dumps(spec))
        except InputError as error:
            raise ApiError(f"{param}: {error}", param=param, code="unsupported_schema") from None

    def _stops(self, stop: Any) -> tuple[str, ...]:
        texts = [stop] if isinstance(stop, str) else [] if stop is None else stop
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            raise ApiError("stop must be a text or a list of texts, none empty", param="stop")
        if len(texts) > self.settings.most_stops or any(len(t) > self.settings.most_stop_characters for t in texts):
            most, long = self.settings.most_stops, self.settings.most_stop_characters
            raise ApiError(f"at most {most} stop texts of {long} characters", param="stop")
        return tuple(texts)


def _value_spec(form: Any) -> dict[str, Any]:
    """What `response_format` asks for, as `form_walker` is told it; nothing for any text."""
    if form is None or form == {"type": "text"}:
        return {}
    param, kind = "response_format", form.get("type") if isinstance(form, dict) else None
    if kind not in ("json_object", "json_schema") or set(form) - {"type", "json_schema"}:
        raise ApiError("response_format is {type: text}, json_object, or json_schema with its schema", param=param)
    asked = form.get("json_schema")
    if kind == "json_schema" and (not isinstance(asked, dict) or not isinstance(asked.get("schema"), dict)):
        raise ApiError("json_schema must be an object with name and schema", param=param)
    return {"schema": asked["schema"] if kind == "json_schema" else None}


def _usage(fields: Fields) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise ApiError("stream_options must be an object", param="stream_options")
    if not fields.boolean("stream"):
        raise ApiError("stream_options needs stream: true", param="stream_options")
    return Fields(options, ("include_usage", "include_obfuscation")).boolean("include_usage")
