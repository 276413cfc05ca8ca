"""The archive's tables; one row per record of selfdev_jax/records.py.

What a row was computed by stands once, in `activities` (an activity in the
sense of W3C PROV): arm, iteration, stage, seed, when, and the session with its
versions and hardware. Every other row names its activity and, by foreign keys,
what it was made from: a score the program, a program the completion, a
completion the factory, a factory the pairs of the iteration before, a pair two
completions and their scores.
"""

import sqlalchemy as sa

# Of `migrations/`; an archive says which one it has in `alembic_version`.
REVISION = "6"

METADATA = sa.MetaData()


def _table(name, *columns, **options):
  return sa.Table(name, METADATA, *columns, **options)


def _text(name, **options):
  return sa.Column(name, sa.Text, nullable=options.pop("nullable", False))


def _integer(name, *keys, **options):
  nullable = options.pop("nullable", False)
  return sa.Column(name, sa.Integer, *keys, nullable=nullable, **options)


def _real(name, nullable=False):
  return sa.Column(name, sa.Float, nullable=nullable)


def _by():
  return _integer("activity", sa.ForeignKey("activities.id"))


_COMPLETION = ["completions.arm", "completions.iteration", "completions.item"]

META = _table(
    "meta",
    sa.Column("key", sa.Text, primary_key=True, nullable=False),
    _text("value"),  # JSON
)
SESSIONS = _table(
    "sessions",  # One for each start of the run.
    sa.Column("id", sa.Integer, primary_key=True),
    _text("provenance"),  # JSON: versions, hardware, command, git revision.
)
ACTIVITIES = _table(
    "activities",  # What a session did, stage by stage.
    sa.Column("id", sa.Integer, primary_key=True),
    _integer("session", sa.ForeignKey("sessions.id")),
    _text("arm"),
    _integer("iteration"),  # 0 for what belongs to none.
    _text("stage"),
    _integer("seed"),  # Keys are folded from it, iteration, stage and item.
    _real("started", nullable=True),  # Unix time; NULL before schema 5.
    _real("seconds"),  # Until the last write, or the end.
    _real("writing_s"),  # Of these, in transactions.
    _integer("done"),  # Of `total`, since it started.
    _integer("total", nullable=True),
    _text("unit"),
    _integer("finished"),  # 0: under way, or cut short.
)
FACTORIES = _table(
    "factories",
    sa.Column("iteration", sa.Integer, primary_key=True),
    # Checksum of the adapter; empty: the seed model, or before schema 5.
    _text("digest"),
    _by(),
)
COMPLETIONS = _table(
    "completions",
    sa.Column("arm", sa.Text, primary_key=True),
    sa.Column("iteration", sa.Integer, primary_key=True),
    sa.Column("item", sa.Integer, primary_key=True),
    _text("text"),
    _integer("finished"),
    _text("engine"),  # Name and version of what sampled it.
    _integer("factory", sa.ForeignKey("factories.iteration")),
    _by(),
)
PROGRAMS = _table(
    "programs",  # What the verifier let through.
    sa.Column("digest", sa.Text, primary_key=True, nullable=False),
    _text("arm"),  # The completion that gave it first.
    _integer("iteration"),
    _integer("item"),
    _by(),
    # The long ones last: who wants none of them need not pass over them.
    _text("stats"),  # JSON
    sa.Column("fingerprint", sa.LargeBinary, nullable=False),  # float64, "<f8".
    _text("program"),  # JSON program IR.
    sa.ForeignKeyConstraint(["arm", "iteration", "item"], _COMPLETION),
)
VERDICTS = _table(
    "verdicts",
    sa.Column("arm", sa.Text, primary_key=True),
    sa.Column("iteration", sa.Integer, primary_key=True),
    sa.Column("item", sa.Integer, primary_key=True),
    # NULL: rejected.
    sa.Column("digest", sa.Text, sa.ForeignKey("programs.digest")),
    _text("stage"),
    _text("code"),
    _by(),
    _text("message"),
    _text("source"),
    sa.ForeignKeyConstraint(["arm", "iteration", "item"], _COMPLETION),
    sa.Index("verdicts_digest", "digest", "arm", "iteration", "item"),
    sa.Index("verdicts_reason", "arm", "iteration", "stage", "code"),
)
CANDIDATES = _table(
    "candidates",  # What an arm evaluates: new, within its budget, in order.
    sa.Column("arm", sa.Text, primary_key=True),
    sa.Column("iteration", sa.Integer, primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column(
        "digest", sa.Text, sa.ForeignKey("programs.digest"), nullable=False
    ),
    _by(),
    sa.Index("candidates_digest", "digest"),
)
SCORES = _table(
    "scores",
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column(
        "split",
        sa.Text,
        sa.CheckConstraint("split IN ('dev', 'test')"),
        primary_key=True,
    ),
    _integer("n"),  # Items answered.
    _integer("correct", nullable=True),  # NULL: there is no merged model.
    _real("merge_s"),
    _real("evaluate_s"),
    _text("engine"),
    _text("failure"),  # Why not, else empty.
    _text("reused", nullable=True),  # Model whose score this is.
    _integer("items"),  # Of the split; n is less: stopped.
    # NULL: a baseline.
    sa.Column("program", sa.Text, sa.ForeignKey("programs.digest")),
    # Checksum of the merged model; empty: none was made, or before schema 5.
    _text("weights"),
    _real("at", nullable=True),  # Unix time of the last answers.
    _by(),  # That began it.
    sa.ForeignKeyConstraint(
        ["reused", "split"], ["scores.model", "scores.split"]
    ),
    sa.CheckConstraint("n <= items", name="answered"),
    sa.Index("scores_program", "program", "split"),
)
QUESTIONS = _table(
    "questions",  # Shared by all models' responses.
    sa.Column("split", sa.Text, primary_key=True),
    sa.Column("item", sa.Integer, primary_key=True),
    _text("prompt"),
    _text("gold"),
)
RESPONSES = _table(
    "responses",
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("split", sa.Text, primary_key=True),
    sa.Column("item", sa.Integer, primary_key=True),
    _text("text"),
    _text("extracted", nullable=True),
    _integer("correct"),
    _integer("truncated"),  # The prompt lost its beginning.
    _text("trouble"),  # The scorer's, else empty.
    _by(),
    sa.ForeignKeyConstraint(
        ["model", "split"], ["scores.model", "scores.split"]
    ),
    sa.ForeignKeyConstraint(
        ["split", "item"], ["questions.split", "questions.item"]
    ),
    # Rare, and asked for each time the page is made.
    sa.Index(
        "responses_truncated",
        "split",
        "item",
        sqlite_where=sa.text("truncated"),
    ),
    sa.Index(
        "responses_trouble",
        "split",
        "trouble",
        sqlite_where=sa.text("trouble != ''"),
    ),
    sqlite_with_rowid=False,
)
PAIRS = _table(
    "pairs",
    sa.Column("iteration", sa.Integer, primary_key=True),
    sa.Column("item", sa.Integer, primary_key=True),
    _text("prompt"),
    _text("chosen"),
    _text("rejected"),
    sa.Column(
        "chosen_digest",
        sa.Text,
        sa.ForeignKey("programs.digest"),
        nullable=False,
    ),
    sa.Column("rejected_digest", sa.Text, sa.ForeignKey("programs.digest")),
    _text("arm"),  # The loop's.
    _integer("chosen_iteration"),  # An elite is of an earlier one.
    _integer("chosen_item"),
    _integer("rejected_item"),
    _by(),
    sa.ForeignKeyConstraint(
        ["arm", "chosen_iteration", "chosen_item"], _COMPLETION
    ),
    sa.ForeignKeyConstraint(["arm", "iteration", "rejected_item"], _COMPLETION),
    sa.Index("pairs_chosen", "chosen_digest"),
    sa.Index("pairs_rejected", "rejected_digest"),
)
STEPS = _table(
    "steps",
    sa.Column("iteration", sa.Integer, primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True),
    _text("metrics"),  # JSON, TRL's names.
    _by(),
)
DONE = _table(
    "done",  # Stages that need not run again.
    sa.Column("arm", sa.Text, primary_key=True),
    sa.Column("iteration", sa.Integer, primary_key=True),
    sa.Column("stage", sa.Text, primary_key=True),
    _by(),
)
INCIDENTS = _table(
    "incidents",  # What happened to workers of a run over many hosts.
    sa.Column("id", sa.Integer, primary_key=True),
    _text("kind"),
    _text("worker"),  # Its name.
    _text("host"),
    _text("detail"),
    _real("at"),  # Unix time.
    _by(),  # That was under way.
)
