"""A compiled program: save it, load it, inspect it, run it here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergec.compiler.answer import Answer, PlainAnswer, phases_of
from mergec.compiler.config import PAST
from mergec.compiler.report.graph_view import GraphView
from mergec.compiler.report.inspect import Inspection, inspect_costs
from mergec.compiler.report.rows import PassRow
from mergec.compiler.report.tables import html, table
from mergec.compiler.report.text import readable
from mergec.runtime.core.arguments import Arguments
from mergec.runtime.core.errors import BundleError, PromptError
from mergec.runtime.core.network import NETWORKS
from mergec.runtime.core.spec import ROLES
from mergec.runtime.program.bundle import (
    GRAPH,
    MANIFEST,
    TOKENIZER,
    check_alike,
    complete,
    expect,
    load_bundle,
    role_path,
)
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.session.generation import check_prompt
from mergec.runtime.session.public_blocks import block_tokens, combined_caches, frame, texts_of
from mergec.runtime.session.public_text import check_text, prompt_tokens, public_tokens
from mergec.runtime.session.sampling import Chooser, Sampling
from mergec.runtime.session.text import VOCABULARY, Stream, Text

if TYPE_CHECKING:
    from mergec.compiler.backend.cost import CostReport
    from mergec.compiler.backend.onnx_export import ValueType
    from mergec.compiler.report.history import History
    from mergec.runtime.engine.audit_report import Audit

Progress = Callable[[str], object]

MODES = ("mergec", "crypten")
"""Protocols that `generate_local` can run."""


def _quiet(_: object) -> None:
    """No progress."""


class Program:
    """The programs of client, server and dealer, and the client's tokenizer.

    `compile_decoder` returns one in memory, `Program.load` reads one from disk. In a notebook it
    shows a summary.

    roles: the program of each role that is at hand, by name.
    path: the folder of its bundles; None if it was never saved.
    history: how it was compiled; None if it was loaded.

    A program can be copied and pickled; the copy has no path and no history.

    Example:
        >>> program = mergec.Program.load("bundles/mine")  # doctest: +SKIP
        >>> print(program.describe())  # doctest: +SKIP
        >>> program.inspect(new=1, past=128).total.rounds  # doctest: +SKIP
        >>> program.generate_local("The capital of France is").text  # doctest: +SKIP
    """

    def __init__(
        self,
        roles: Mapping[str, RoleProgram],
        types: Mapping[str, ValueType] | None = None,
        tokenizer_files: Mapping[str, bytes] | None = None,
        path: Path | None = None,
        history: History | None = None,
    ) -> None:
        """types: dtypes and shapes of results, by name; by default read from `path` when needed.

        tokenizer_files: the client's tokenizer, as files by name.
        """
        self.roles = dict(roles)
        self.path = path
        self.history = history
        self._types = dict(types or {})
        self._files = dict(tokenizer_files or {})
        self._text: Text | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For `pickle` and `copy`: the programs, types and tokenizer. Not the history: it holds
        the model's own graph, and a program that was loaded has none either."""
        # Words would be stored twice: a program in memory has its weights as real numbers.
        roles = {
            role: replace(program, words={}, words_file=None)
            for role, program in self.roles.items()
        }
        return {"roles": roles, "types": self._value_types(), "files": self._files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is as good as unsaved: its folder may be elsewhere, or gone."""
        self.__init__(state["roles"], state["types"], state["files"])  # type: ignore[misc]

    @property
    def any_role(self) -> RoleProgram:
        """The program of one of the roles at hand; the instructions of all roles are the same."""
        return next(iter(self.roles.values()))

    @property
    def manifest(self) -> Manifest:
        """Name, options, limits, costs and pass reports; `to_dict` returns it as JSON values.

        `role` is that of `any_role`; `files` and `digest` are empty until the program is saved.
        """
        program = self.any_role
        if not program.manifest.program_hash:
            program.manifest = complete(program)
        return program.manifest

    @staticmethod
    def stands_at(path: str | Path) -> bool:
        """Whether `path` is a folder that holds the bundle of at least one role."""
        return any((role_path(path, role) / MANIFEST).is_file() for role in ROLES)

    @classmethod
    def load(cls, path: str | Path, roles: Sequence[str] = ROLES) -> Program:
        """Read the bundles of `roles` from the folder `path`.

        Raises BundleError, in one line that names the file, if a bundle is missing, damaged, of
        another version or of another program than the others.
        """
        check = Arguments(BundleError)
        place = check.path("path", path)
        if not (wanted := check.names("roles", roles)):
            raise BundleError(f"roles is empty; name some of: {', '.join(ROLES)}")
        for role in wanted:
            check.choice("a role", role, ROLES)
        check_whole(place)
        check_alike(place)
        programs = {role: load_bundle(role_path(place, role), role) for role in wanted}
        folder = role_path(place, "client") / TOKENIZER
        files = {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        return cls(programs, None, files, place)

    def check(self, expected: str | None = None, tokenizer: str | Path | None = None) -> None:
        """Compare the program's hash with the expected one, and take another tokenizer, if given.

        Raises BundleError if the hash is another one, or if there is no tokenizer at that place.
        """
        check = Arguments(BundleError)
        if expected is not None:
            expect(self.manifest, check.text("expected", expected), tokenizer is not None)
        if tokenizer is not None:
            self._text = Text.given(check.path("tokenizer", tokenizer))

    def save(self, path: str | Path, progress: Progress = _quiet) -> Path:
        """Write the three bundles to the folder `path`, all or none; return the folder.

        Bundles that stand there already are replaced. progress: called with one line of text as
        each bundle begins. Raises BundleError if not all roles are at hand, or if `path` cannot be
        written or holds something other than bundles.
        """
        from mergec.compiler.backend.emit import emit

        check = Arguments(BundleError)
        place = check.path("path", path)
        check.function("progress", progress)
        missing = [role for role in ROLES if role not in self.roles]
        if missing:
            raise BundleError(f"the {missing[0]}'s program was not loaded; load all roles to save")
        self.path = emit(self.roles, self._value_types(), place, self._files, progress)
        return self.path

    def describe(self) -> str:
        """One line: name, number of instructions, precision, and the start of the hash."""
        manifest = self.manifest
        lossy = ", lossy" if manifest.lossy else ""
        return (
            f"{manifest.model or 'program'}, "
            f"{len(self.any_role.instructions)} instructions, "
            f"{manifest.fractional_bits} fractional bits{lossy}, "
            f"program {manifest.program_hash[:12]}"
        )

    def _repr_html_(self) -> str:
        """For a notebook."""
        manifest = self.manifest
        rows = [
            ["program", manifest.model or "program"],
            ["hash", manifest.program_hash[:12]],
            ["instructions", f"{len(self.any_role.instructions):,}"],
            ["exact", "no" if manifest.lossy else "yes"],
            *([["deviation", self.deviation]] if self.deviation else []),
            ["weights", manifest.weights],
            ["reveal", manifest.reveal],
            *(
                [["generation settings", ", ".join(manifest.generation.to_dict())]]
                if manifest.generation
                else []
            ),
            *([["noise in a logit", f"{manifest.logit_noise:g}"]] if manifest.logit_noise else []),
            ["network", manifest.network],
            ["rounding", manifest.rounding],
            ["tokens at most", f"{manifest.max_length:,}" if manifest.max_length else "no limit"],
            *(
                [
                    f"{name}: {step['new']:,} new after {step['past']:,}",
                    f"{step['rounds']:,} rounds, {readable(step['online'])} online",
                ]
                for name, step in manifest.cost.items()
            ),
            ["saved at", str(self.path) if self.path else "not saved"],
        ]
        return html(table("", [["", ""], *rows]))

    @property
    def deviation(self) -> str:
        """One sentence: the distance of a lossy program from its model; empty if it is exact."""
        said = self.manifest.deviation
        if not said:
            return ""
        return (
            f"on the calibration prompts the next token is the model's at {said['agreed']} of "
            f"{said['places']} places, and logits are {said['mean']:.2g} apart in the mean and "
            f"{said['worst']:.2g} at most, where the model's own vary by {said['spread']:.2g}"
        )

    def inspect(
        self,
        new: int = 1,
        past: int | None = None,
        *,
        source: int | None = None,
        savings: bool = False,
    ) -> Inspection:
        """Rounds and bytes of one step, by op and by layer, and what each pass did.

        Args:
            new: tokens of the step: the prompt's length, or 1 for a decode step. A program that
                resends its hidden state ends with a step of 0 new tokens.
            past: tokens before the step; by default 128, or as many as the program allows. In an
                encoder-decoder: the tokens of the source and those of the answer so far; 0 for the
                step that reads a source of `new` tokens.
            source: in a decode step of an encoder-decoder, how many of `past` are the source's; by
                default all.
            savings: also compute what each pass saves. This takes about as long as one more compile
                per pass, and needs a program that was compiled in this process.

        Raises:
            PromptError: the program cannot run a step of these lengths.
            BundleError: savings are asked of a program that was loaded.
        """
        Arguments(PromptError).flag("savings", savings)
        return self._inspect(self._costs(new, past, source), savings, source)

    def to_html(
        self,
        new: int = 1,
        past: int | None = None,
        *,
        source: int | None = None,
        savings: bool = False,
    ) -> str:
        """`inspect` as a self-contained HTML page, with graphs and the changes of each pass.

        Arguments and errors are those of `inspect`. A program that was loaded shows only the graph
        that the parties run.
        """
        from mergec.compiler.report.html import page

        report = self._costs(new, past, source)
        inspection, found = self._inspect(report, savings, source), self.audit()
        if self.history is None:
            return page(inspection, report, self.graph, audit=found)
        before, changes = self.history.before, self.history.changes
        return page(inspection, report, self.graph, before, changes, found)

    def audit(self, queries: int = 1000) -> Audit:
        """What each role sees when the program runs; `to_text` and `to_json` show it.

        It runs the protocols on shapes, so it shows every message of every op. queries: steps that
        a client is assumed to ask for, to tell what their answers determine of the weights.
        """
        from mergec.runtime.engine.audit import audit

        queries = Arguments(PromptError).whole("queries", queries, 1)
        self.any_role.manifest = self.manifest
        return audit(self.any_role, queries)

    def _costs(self, new: int, past: int | None, source: int | None = None) -> CostReport:
        from mergec.compiler.backend.cost import cost_report

        check = Arguments(PromptError)
        new = check.whole("new", new, 0)
        past = None if past is None else check.whole("past", past, 0)
        limit = self.manifest.max_length
        resends = self.any_role.resends
        if past is None:
            # Of a program that resends its hidden state, only the prompt has several tokens.
            first = (resends or self.any_role.encodes) and new > 1
            past = 0 if first else min(PAST, max(limit - new, 0)) if limit else PAST
        if new == 0 and not (resends and past):
            raise PromptError(
                "`new` must be at least 1; only a program of merge-er ends with a step of no tokens"
            )
        if resends and new > 1 and past:
            raise PromptError(
                f"this program takes one token after the prompt, not {new}; "
                "ask for new=1, or for past=0"
            )
        if limit and new + past > limit:
            raise PromptError(
                f"{new} new tokens after {past} are more than the {limit} of this program; "
                "ask for fewer"
            )
        if source is not None:
            source = check.whole("source", source, 1)
            if not self.any_role.encodes or past == 0:
                raise PromptError(
                    "`source` is for a decode step of an encoder-decoder; leave it out"
                )
            if source > past:
                raise PromptError(f"a source of {source} tokens is longer than `past`, {past}")
        return cost_report(self.any_role, new, past, self.manifest.fractional_bits, source=source)

    def _inspect(self, report: CostReport, savings: bool, source: int | None = None) -> Inspection:
        from mergec.runtime.engine.rehearsal import Rehearsal, latencies, step_cost

        manifest = self.manifest
        shown = ("fractional_bits", "max_length", "vocab_size", "lossy", "program_hash", "weights",
                 "reveal", "logit_noise", "network", "rounding")  # fmt: skip
        step = step_cost(Rehearsal(self.any_role), report.new, report.past, source=source)
        waiting = step.waiting(NETWORKS[manifest.network])
        return inspect_costs(
            report,
            manifest.model or "program",
            manifest.cost,
            self._passes(report.new, report.past, source, savings),
            manifest.left_out,
            {key: getattr(manifest, key) for key in shown}
            | ({"deviation": self.deviation} if self.deviation else {})
            | {f"dealt_to_{role}": count for role, count in step.dealt.items()}
            | {"one_way_latencies": latencies(step.rounds)}
            | {"estimated_network_seconds": round(waiting.total, 4)}
            | {"waiting_for": {key: round(value, 4) for key, value in asdict(waiting).items()}}
            | self._variants(),
        )

    def _variants(self) -> dict[str, str]:
        """Which protocols were chosen for the program's network and not for `loopback`."""
        manifest = self.manifest
        if manifest.network == "loopback":
            return {}
        from mergec.compiler.backend.choose import chosen_otherwise

        found = chosen_otherwise(self.any_role, NETWORKS["loopback"], manifest.fractional_bits)
        listed = ", ".join(f"{count} of {target}" for target, count in found.items())
        return {"chosen_otherwise_than_for_loopback": listed or "nothing"}

    def _passes(self, new: int, past: int, source: int | None, savings: bool) -> list[PassRow]:
        saved = {}
        if savings:
            saved = {saving.name: saving for saving in self._history().savings(new, past, source)}
        return [PassRow.of(entry, saved.get(entry["pass"])) for entry in self.manifest.passes]

    def _history(self) -> History:
        if self.history is None:
            raise BundleError(
                "bundles do not hold the graph that they were compiled from; "
                "inspect the model itself"
            )
        return self.history

    @property
    def graph(self) -> GraphView:
        """The instructions of one step: `print` it, or call its `to_dot` or `to_onnx`."""
        return GraphView(self.any_role, self._value_types())

    @property
    def captured_graph(self) -> GraphView:
        """The graph as captured, before any pass. Raises BundleError if the program was loaded."""
        return self._history().before

    def _value_types(self) -> dict[str, ValueType]:
        if not self._types and self.path is not None:
            from mergec.compiler.backend.onnx_export import read_types

            self._types = read_types(role_path(self.path, self.any_role.role) / GRAPH)
        return self._types

    def text(self) -> Text:
        """The client's tokenizer. Raises a MergecError if the program has none."""
        return self._text or Text.from_files(self._files, str(self.path or "the program"))

    def generate_local(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 32,
        mode: str = "mergec",
        device: str = "cpu",
        ranks: int = 1,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        chat: bool | None = None,
        speculate: str = "none",
        speculate_tokens: int | None = None,
        speculate_fixed: float | None = None,
        speculate_extra: int | None = None,
        speculate_tree: bool = False,
        public_prefix: str | Sequence[int] | None = None,
        public_blocks: Sequence[str | Sequence[int]] = (),
        prompt_piece: int = 0,
        overlap: bool = True,
        pad_prompt: int = 0,
        on_text: Callable[[str], object] = _quiet,
    ) -> Answer:
        """Run client, server and dealer as three processes on this machine.

        A program that was never saved is written to a temporary folder first.

        Args:
            prompt: text, or token numbers.
            max_tokens: most tokens of the answer; a stop token ends it earlier.
            mode: "mergec", or "crypten" for CrypTen's stock protocols, for comparison.
            device: where client and server compute, such as "cpu" or "cuda".
            ranks: processes that share the weights and caches of each role; with "cuda" each has a
                GPU of its own.
            temperature: 0 always takes the best token; more makes the choice more random. None,
                here and below, leaves it to the checkpoint's generation settings; if they say
                nothing, the best token is taken.
            top_k: choose among this many best tokens; 0 for all.
            top_p: choose among the best tokens whose probabilities add up to this, 0 to 1.
            seed: repeats the choice of tokens; None for a fresh one.
            min_p: choose among tokens at least this fraction as likely as the likeliest; 0 for all.
            repetition_penalty: above 1 makes tokens that occurred less likely; 1 for none.
            chat: whether to put text into the model's chat template; None if there is one.
            speculate: what drafts the next tokens, so that a step can give several: `lookup`,
                `medusa`, `recycle`, `retrieve:DIR`, `draft:DIR`, several joined by "+", or `none`.
                Greedy answers and those of a seed stay the same. The program must have been
                compiled with `speculate_up_to`.
            speculate_tokens: drafts of a step; None to choose as many as pay.
            speculate_fixed: tokens that each step keeps in the mean, such as 2 or 1.5, so that its
                lengths do not tell how many drafts were right; None for as many as are right.
            speculate_extra: most extra steps of an answer that speculate_fixed takes where too few
                were right, before it goes on with one token a step; None for any number.
            speculate_tree: let drafts form a tree of several continuations. Server and dealer see
                its shape, and which path of it is right.
            public_prefix: what the prompt begins with and both parties know. The server computes
                its keys and values in the clear, so it takes no steps. A text is the system message
                in a chat template, else the beginning of the text; token numbers go before those of
                the prompt. None for none.
            public_blocks: texts, or token numbers like the prompt, that follow `public_prefix` and
                that both parties know, such as examples. They do not look at each other, so this is
                another function than the model's (see the guide to public text).
            prompt_piece: most tokens of the prompt that one step takes, which bounds the memory
                that a long prompt takes; 0 for any number.
            overlap: let the two halves of a prompt overlap where the program's network is slow: one
                is computed while the other's messages travel.
            pad_prompt: pad the prompt on the left to the next multiple of this number, or to as
                many tokens as fit, so that server and dealer learn no more of its length. The
                answer stays the same. The program must have been compiled with `pad_prompt`.
            on_text: called with each piece of the answer's text as it comes.

        Returns:
            The answer, with seconds, rounds and bytes as counted at the transport.

        Raises:
            PromptError: the prompt is empty, too long, or has tokens outside of the vocabulary.
            PartyError: one of the three processes failed; the message is its own.
        """
        check = Arguments(PromptError)
        max_tokens = check.whole("max_tokens", max_tokens, 1)
        prompt_piece = check.whole("prompt_piece", prompt_piece, 0)
        pad_prompt = check.whole("pad_prompt", pad_prompt, 0)
        check.choice("mode", mode, MODES)
        check.text("device", device)
        ranks = check.whole("ranks", ranks, 1)
        options = {
            "temperature": temperature,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
        }
        given = {k: check.number(k, v) for k, v in options.items() if v is not None}
        if top_k is not None:
            top_k = check.whole("top_k", top_k, 0)
        seed = None if seed is None else check.whole("seed", seed, 0, 2**63 - 1)
        check.flag("chat", chat, or_none=True)
        check.flag("overlap", overlap)
        check.text("speculate", speculate)
        if speculate_tokens is not None:
            speculate_tokens = check.whole("speculate_tokens", speculate_tokens, 1)
        if speculate_fixed is not None:
            speculate_fixed = check.number("speculate_fixed", speculate_fixed)
        if speculate_extra is not None:
            speculate_extra = check.whole("speculate_extra", speculate_extra, 0)
        check.flag("speculate_tree", speculate_tree)
        check.function("on_text", on_text)
        sampling = Sampling(top_k=top_k, seed=seed, **given)
        ids, text, templated, public, blocks = self._tokens(
            prompt, chat, max_tokens, public_prefix, public_blocks
        )
        from mergec.runtime.roles.local import run_local

        # What an encoder-decoder answers is a text of its own.
        continues = not templated and not self.any_role.encodes
        after = ids if continues else ()
        stream = Stream(text, on_text, after) if text is not None else None
        result = run_local(
            self._place(),
            ids,
            max_tokens=max_tokens,
            mode=mode,
            device=device,
            ranks=ranks,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            speculate=speculate,
            speculate_tokens=speculate_tokens,
            speculate_fixed=speculate_fixed,
            speculate_extra=speculate_extra,
            speculate_tree=speculate_tree,
            public=public,
            blocks=blocks,
            prompt_piece=prompt_piece,
            overlap=overlap,
            pad_prompt=pad_prompt,
            on_token=stream.token if stream is not None else None,
        )
        return Answer(
            text=stream.end() if stream is not None else "",
            prompt=ids,
            tokens=list(result.tokens),
            sampling=sampling,
            max_tokens=max_tokens,
            continues=continues,
            blocks=tuple(map(len, [public, *blocks])) if blocks else (),
            phases=phases_of(result),
            peak_memory=dict(result.peak_memory),
        )

    def plaintext(self, answer: Answer) -> PlainAnswer:
        """Continue the answer's prompt in the clear, with the same choice of tokens and length.

        Sampled tokens can be compared only if the answer was generated with a seed. Raises
        BundleError if the server's program is not at hand.
        """
        from mergec.runtime.engine.plain import PlainExecutor

        remedy = "pass what generate_local returned"
        Arguments(PromptError).instance("answer", answer, Answer, remedy)
        if "server" not in self.roles:
            raise BundleError("plaintext needs the server's program; load it")
        plain = PlainExecutor(self.roles["server"])
        stop = self.manifest.stop_tokens
        tokens, margins = [], []
        most = answer.max_tokens or len(answer.tokens)
        pick = Chooser(answer.sampling, self.manifest, answer.prompt, most)
        begun = None
        if answer.blocks:
            parts = [0, *accumulate(answer.blocks)]
            head, *blocks = [answer.prompt[a:b] for a, b in pairwise(parts)]
            begun = parts[-1], combined_caches(plain, head, blocks)
        for token, logits in plain.generate(answer.prompt, len(answer.tokens), pick, stop, begun):
            best = logits.topk(2).values
            tokens.append(token)
            margins.append(float(best[0] - best[1]))
        after = answer.prompt if answer.continues else ()
        text = self.text().decode(tokens, after) if self._has_text() else ""
        return PlainAnswer(text, tokens, margins)

    def _has_text(self) -> bool:
        return self._text is not None or VOCABULARY in self._files

    def _tokens(
        self,
        prompt: str | Sequence[int],
        chat: bool | None,
        max_tokens: int,
        public: str | Sequence[int] | None,
        blocks: Sequence[str | Sequence[int]],
    ) -> tuple[list[int], Text | None, bool, list[int], list[list[int]]]:
        """The prompt's tokens, checked against the program's limits, the tokenizer if any, whether
        the chat template was applied, and those of the tokens that are public: of the beginning,
        and of each block.
        """
        text = self.text() if self._has_text() or isinstance(prompt, str) else None
        if isinstance(blocks, (str, bytes)) or not isinstance(blocks, Sequence):
            raise PromptError("public_blocks is no list; pass one of texts, or of token numbers")
        if isinstance(public, str) and not isinstance(prompt, str):
            raise PromptError("this prompt is token numbers; give public_prefix as such, too")
        parts = [*blocks, public] if blocks and public is not None else blocks
        if any(isinstance(part, str) != isinstance(prompt, str) for part in parts):
            raise PromptError(
                "the prompt and its public blocks are all texts, or all token numbers"
            )
        check = Arguments(PromptError)
        templated, begins, known = False, list[int](), list[list[int]]()
        if isinstance(prompt, str) and text is not None:
            if not prompt.strip():
                raise PromptError("the prompt is empty; say something")
            templated = text.has_chat if chat is None else chat
            if blocks:
                begins, rest = frame(text, prompt, templated, str(public or ""))
                known = [block_tokens(text, str(block)) for block in blocks]
                ids = [*begins, *chain(*known), *rest]
            else:
                of_text = public if isinstance(public, str) else None
                ids = prompt_tokens(text, prompt, templated, of_text)
                if of_text is not None:
                    begins = public_tokens(text, of_text, templated)
                elif public is not None:
                    begins = check.tokens("public_prefix", public)
                    ids = [*begins, *ids]
        else:
            if chat:
                raise PromptError("chat=True needs a text; this prompt is token numbers")
            begins = [] if public is None else check.tokens("public_prefix", public)
            known = [check.tokens("public_blocks", block) for block in blocks]
            ids = [*begins, *chain(*known), *check.tokens("prompt", prompt)]
        check_prompt(ids, max_tokens, self.manifest)
        for part in texts_of(begins, known):
            check_text(self.any_role, part)
        return ids, text, templated, begins, known

    def _place(self) -> Path:
        """The folder of the bundles; a temporary one for a program that was never saved."""
        if self.path is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="mergec-")
            self.save(Path(self._temporary.name) / "program")
        if self.path is None:
            raise BundleError("the program could not be saved; save it yourself")
        return self.path


def check_whole(path: Path) -> None:
    """Raise BundleError if `path` is the bundle of one role, not a folder of bundles."""
    if (path / MANIFEST).is_file():
        raise BundleError(f"{path}: is the bundle of one role; give the folder that it is in")
