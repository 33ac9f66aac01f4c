"""Records of `generate` and `judge`: answers to questions, and their grades."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sparsegrad_cli.records.base import Block, Count, Number, Record, Seconds
from sparsegrad_cli.records.run import ErrorBlock

Name = str | int
Grade = Annotated[float, Field(ge=1, le=10)]
Stopped = Literal["end", "length", "full"]


class GenerationSettings(Block):
    """All settings that an answer depends on."""

    system: str | None = None
    max_new_tokens: Count | None = None
    temperature: Number = Field(None, description="0: always the most likely token.")
    top_p: Number = None
    seed: int | None = None


class AnswerLine(Block):
    """The answers of one model to one question. In a .jsonl file, a line has all keys."""

    question_id: Name | None = None
    category: str | None = None
    turns: list[str] = Field([], description="The question, one text per turn.")
    answers: list[str] = Field([], description="One per turn.")
    stopped: list[Stopped] = Field(
        [], description="By turn: at a stop token, at max_new_tokens, or at the last position."
    )
    model: str | None = None
    kind: str | None = Field(None, description="What answered: run, adapter, lora or model.")
    source: str | None = Field(None, description="For a run: `adapter`, or a checkpoint.")
    trained: str | None = Field(None, description="For a run: sha256 (hex) of its adapter.")
    recipe_digest: str | None = None
    method: str | None = None
    base: str | None = Field(None, description="The base model.")
    digest: str | None = Field(None, description="sha256 (hex) of all weights.")
    dtype: str | None = None
    quantization: str | None = None
    settings: GenerationSettings | None = None
    prompt_tokens: list[Count] = []
    answer_tokens: list[Count] = []
    seconds: Seconds = None
    time: str | None = None


class AskedQuestion(Block):
    """One question."""

    question_id: Name | None = None
    category: str | None = None
    turns: list[str] = []
    reference: list[str | None] = []


class AnswersColumn(Block):
    """One model that was asked: a run, or the base model of runs."""

    task: str | None = Field(None, description="Null for a base model.")
    method: str | None = None
    seed: int | None = None
    tasks: list[str] = Field([], description="For a base model: the tasks of its runs.")
    run_dir: str | None = Field(None, description="Relative to the comparison's folder.")
    finished: str | None = Field(None, description="When the run ended.")
    model: str | None = None
    digest: str | None = Field(None, description="sha256 (hex) of all weights.")
    dtype: str | None = None
    status: Literal["pending", "done", "failed"]
    error: ErrorBlock | None = None
    asked: Count | None = Field(None, description="Questions answered by the last call.")
    file: str | None = Field(None, description="Relative to the comparison's folder.")
    answers: list[AnswerLine] = []


class AnswersRecord(Record):
    """answers/<questions>.json of a comparison. Base models come first."""

    status: Literal["running", "done", "failed", "interrupted"]
    questions: str | None = None
    settings: GenerationSettings | None = None
    asked: list[AskedQuestion] = []
    columns: list[AnswersColumn] = []
    finished: str | None = None
    output: str | None = Field(None, description="Only in the output of the command.")


class JudgeReply(Block):
    """One reply of the judge."""

    text: str
    finish: str | None = Field(None, description="The server's reason for the end of the reply.")
    usage: dict[str, int] = Field({}, description="Numbers of tokens, as the server counts them.")


class JudgeVerdict(Block):
    """One prompt to the judge, with its outcome."""

    key: str = Field("", description="sha256 (hex) of the judge's name and the prompt.")
    kind: Literal["single", "pair"]
    question_id: Name | None = None
    category: str | None = None
    turn: Count = Field(description="The turn that is judged, counted from 1.")
    models: list[str] = Field([], description="The graded model, or the models A and B.")
    messages: list[dict[str, str]] = Field([], description="The prompt.")
    judge: str | None = Field(None, description="The judging model's name.")
    endpoint: str | None = None
    replies: list[JudgeReply] = []
    status: Literal["decided", "unreadable", "failed"] = Field(
        description="Whether there is a verdict, only replies without a verdict, or no reply."
    )
    verdict: Grade | Literal["A", "B", "C"] | None = Field(
        None, description="A grade from 1 to 10, or the better answer of a pair; C: neither."
    )
    reason: str | None = Field(None, description="Why there is no reply.")
    seconds: Seconds = None
    time: str | None = None

    @model_validator(mode="after")
    def _check_verdict(self) -> Self:
        expected = float if self.kind == "single" else str
        if isinstance(self.verdict, expected) != (self.status == "decided"):
            raise ValueError(f"a verdict that fits {self.kind} and {self.status}")
        return self


class JudgedAnswers(Block):
    """The answers of one model that were judged."""

    model: str
    file: str | None = None
    digest: str | None = None
    settings: dict[str, Any] | None = None
    questions: Count | None = None


class JudgeRow(Block):
    """Grades of one model (mode `single`) or wins of the first of two models (`pairwise`)."""

    model: str | None = Field(None, description="single: the model.")
    models: list[str] = Field([], description="pairwise: the two models.")
    category: str | None = Field(None, description="Null: all questions.")
    mean: Number = Field(None, description="single: grade from 1 to 10, mean over questions.")
    share: Number = Field(None, description="pairwise: share won by the first; ties count half.")
    standard_error: Number = Field(None, description="Over questions.")
    questions: Count = 0
    graded: Count | None = Field(None, description="single: turns with a grade.")
    turn_means: list[Number] = []
    pairs: Count | None = Field(None, description="pairwise: pairs of answers.")
    wins: Count | None = None
    losses: Count | None = None
    ties: Count | None = None
    flips: Count | None = Field(
        None, description="Ties where the orders preferred different models."
    )
    first_flips: Count | None = Field(None, description="Flips that favour the answer shown first.")
    one_order: Count | None = Field(None, description="Ties with a preference in one order only.")
    asked: Count = Field(0, description="Number of prompts.")
    unreadable: Count = Field(0, description="Replies without a verdict.")
    failed: Count = Field(0, description="Prompts without a reply.")


class JudgeRequests(Block):
    """Number of verdicts that the last call requested, and that it kept from earlier calls."""

    asked: Count
    kept: Count


class JudgeRecord(Record):
    """judge.json: the summary of verdicts.jsonl."""

    mode: Literal["single", "pairwise"]
    status: Literal["done", "failed"]
    judge: str | None = Field(None, description="The judging model's name.")
    endpoint: str | None = None
    questions: str | None = None
    answers: list[JudgedAnswers] = []
    rows: list[JudgeRow] = []
    requests: JudgeRequests | None = None
    failures: list[str] = []
    notes: list[str] = []
    finished: str | None = None
    output_dir: str | None = None
