"""`accord chat`: questions and answers at a terminal, or one question per line from a pipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.chat.ballot import Ballot
from cluster.chat.conversation import Conversation
from cluster.chat.voice import ChatSettings, Score, Show, Voice
from cluster.contracts.errors import AccordError
from cluster.runs.console import plain_text

PROMPT = "> "
HELP = {
    "/help": "show this list",
    "/reset": "forget the conversation (the system message stays)",
    "/system TEXT": "set the system message and forget the conversation; without TEXT: remove it",
    "/undo": "forget the last question and its answer",
    "/retry": "answer the last question again",
    "/show": "show what is remembered",
    "/set NAME VALUE": "set max_tokens or temperature; without a name: show them",
    "/quit": "leave (also Ctrl-D)",
}
KEYS = (
    "Ctrl-C stops an answer; pressed again, it leaves. A line that ends with \\ goes on in the "
    "next line. Write a space before a question that begins with /."
)


class ChatSession:
    """``read`` returns a line for a prompt; it raises EOFError at the end and KeyboardInterrupt for
    Ctrl-C. ``write`` shows text as it is given, without a line end of its own."""

    def __init__(
        self,
        voices: Sequence[Voice],
        settings: ChatSettings,
        read: Callable[[str], str],
        write: Show,
        *,
        score: Score | None = None,
        remember: bool = True,
        interactive: bool = True,
        ballot: Ballot | None = None,
    ) -> None:
        """``ballot``: asks for a vote after each question; the models are then not named."""
        self._ballot = ballot
        self._voices = voices
        self._settings = settings
        self._read = read
        self._write = write
        self._score = score
        self._interactive = interactive
        plain = any(voice.plain for voice in voices)
        self.conversation = Conversation(plain=plain, remember=remember)
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._system,
            "/undo": self._undo,
            "/retry": self._retry,
            "/show": self._show,
            "/set": self._set,
        }

    def run(self) -> None:
        """Until /quit, the end of the input, or Ctrl-C twice in a row."""
        if self._interactive:
            self._say("Ask something. /help lists the commands, Ctrl-D leaves.")
            if self._ballot is not None:
                self._say(self._ballot.notice)
            if self.conversation.plain:
                self._say("No chat template: lines are continued as plain text, one by one.")
        interrupted = False
        while True:
            try:
                line = self._line()
                if line is None or line.strip() == "/quit":
                    return
                stopped = self.handle(line)
            except KeyboardInterrupt:
                self._write("\n")
                stopped = True
                if interrupted:
                    return
                self._say("(Ctrl-C again or Ctrl-D leaves)")
            interrupted = stopped

    def handle(self, line: str) -> bool:
        """One line: a command or a question. Whether the answer was stopped by Ctrl-C."""
        try:
            if line.startswith("/"):
                name, _, rest = line.strip().partition(" ")
                command = self._commands.get(name, self._unknown)
                command(rest.strip() if command != self._unknown else name)
                return False
            return self._ask(line.strip()) if line.strip() else False
        except AccordError as problem:  # of this line; the chat goes on
            self._say(f"error: {problem}")
            return False

    def _line(self) -> str | None:
        """A line, and those it goes on in; None at the end."""
        parts: list[str] = []
        try:
            while True:
                line = self._read(PROMPT if not parts else ". ")
                if not line.endswith("\\"):
                    return "\n".join([*parts, line])
                parts.append(line[:-1])
        except EOFError:
            if self._interactive:
                self._write("\n")
            return "\n".join(parts) if parts else None

    def _ask(self, question: str) -> bool:
        answers: dict[str, str] = {}
        stopped = False
        voices, labels = self._voices, [voice.name for voice in self._voices]
        if self._ballot is not None:
            named = {voice.name: voice for voice in voices}
            voices, labels = [named[name] for name in self._ballot.next_order()], ["a", "b"]
        prompt = self.conversation.messages(voices[0].name, question)
        for voice, label in zip(voices, labels, strict=True):
            stopped = self._answer(voice, label, question, answers)
            if stopped:
                break
        if answers:
            self.conversation.add(question, answers)
        if self._ballot is not None and len(answers) == len(voices):
            self.conversation.settle(self._ballot.ask(prompt, answers, self._read, self._say))
        elif self._ballot is not None and answers:
            self.conversation.undo()  # only one of them has answered: what follows would differ
        return stopped

    def _answer(self, voice: Voice, label: str, question: str, answers: dict[str, str]) -> bool:
        positions = voice.positions
        room = min(self._settings.max_tokens, (positions or 0) // 2)  # kept free for the answer
        messages, left_out = self.conversation.fitting(
            voice.name,
            question,
            lambda given: positions is None or voice.tokens(given) + room <= positions,
        )
        if left_out and self._interactive:
            self._say(f"(the model does not see the oldest {left_out} questions: too long)")
        if len(self._voices) > 1:
            self._write(f"{label}: ")
        reply = voice.reply(messages, self._settings, lambda piece: self._write(plain_text(piece)))
        self._write("\n")
        answered = bool(reply.text) or reply.ended != "interrupted"
        if answered:
            answers[voice.name] = reply.text
        notes = ["empty answer"] if not reply.text and self._interactive else []
        if self._score is not None and answered:
            notes.append(f"score {self._score(messages, reply):+.3f}")
        if reply.ended == "length" and self._interactive:
            notes.append(f"cut after {reply.tokens} tokens, see /set")
        if reply.ended == "interrupted":
            notes.append("stopped")
        if notes:
            self._say(f"({', '.join(notes)})")
        return reply.ended == "interrupted"

    # -- commands ---------------------------------------------------------------------------------

    def _help(self, rest: str) -> None:
        for command, meaning in HELP.items():
            self._say(f"  {command:<16} {meaning}")
        self._say(KEYS)

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        self._say("(forgotten)")

    def _system(self, rest: str) -> None:
        if self.conversation.plain:
            self._say("(a model without a chat template has no system message)")
            return
        self.conversation.system = rest or None
        self.conversation.reset()
        self._say("(system message set)" if rest else "(no system message)")

    def _undo(self, rest: str) -> None:
        turn = self.conversation.undo()
        self._say("(nothing to undo)" if turn is None else f"(forgotten: {turn.question})")

    def _retry(self, rest: str) -> None:
        turn = self.conversation.undo()
        if turn is None:
            self._say("(no question yet)")
        else:
            self._ask(turn.question)

    def _show(self, rest: str) -> None:
        talk = self.conversation
        if talk.system:
            self._say(f"system: {talk.system}")
        for turn in talk.turns:
            self._say(f"you: {turn.question}")
            if self._ballot is not None:
                self._say(f"the answer that goes on: {next(iter(turn.answers.values()))}")
                continue
            for name, answer in turn.answers.items():
                self._say(f"{name}: {answer}")
        if talk.turns and (talk.plain or not talk.remember):
            self._say("(the model does not see this: each question stands alone)")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        try:
            if name == "max_tokens" and int(value) >= 1:
                self._settings.max_tokens = int(value)
            elif name == "temperature" and 0 <= float(value) < float("inf"):
                self._settings.temperature = float(value)
            elif name:
                raise ValueError
        except ValueError:
            self._say("(try: /set max_tokens 200, or: /set temperature 0.7)")
            return
        now = self._settings
        self._say(f"(max_tokens {now.max_tokens}, temperature {now.temperature:g})")

    def _unknown(self, name: str) -> None:
        self._say(f"(no command {name}; /help lists them)")

    def _say(self, text: str) -> None:
        self._write(plain_text(text) + "\n")
