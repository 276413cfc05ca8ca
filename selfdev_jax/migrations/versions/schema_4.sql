-- Schema version 4. One row per record of selfdev_jax/records.py.
CREATE TABLE meta (
  key TEXT PRIMARY KEY,
  value TEXT NOT NULL                -- JSON
);
CREATE TABLE completions (
  arm TEXT NOT NULL,
  iteration INTEGER NOT NULL,
  item INTEGER NOT NULL,
  text TEXT NOT NULL,
  finished INTEGER NOT NULL,
  engine TEXT NOT NULL,              -- Name and version of what sampled it
  PRIMARY KEY (arm, iteration, item)
);
CREATE TABLE programs (              -- What the verifier let through.
  digest TEXT PRIMARY KEY,
  program TEXT NOT NULL,             -- JSON program IR
  stats TEXT NOT NULL,               -- JSON
  fingerprint TEXT NOT NULL          -- JSON list
);
CREATE TABLE verdicts (
  arm TEXT NOT NULL,
  iteration INTEGER NOT NULL,
  item INTEGER NOT NULL,
  source TEXT NOT NULL,
  digest TEXT REFERENCES programs (digest),   -- NULL: rejected
  stage TEXT NOT NULL,
  code TEXT NOT NULL,
  message TEXT NOT NULL,
  PRIMARY KEY (arm, iteration, item),
  FOREIGN KEY (arm, iteration, item)
    REFERENCES completions (arm, iteration, item)
);
CREATE TABLE scores (
  model TEXT NOT NULL,
  split TEXT NOT NULL CHECK (split IN ('dev', 'test')),
  n INTEGER NOT NULL,                -- Items answered
  correct INTEGER,                   -- NULL: there is no merged model
  merge_s REAL NOT NULL,
  evaluate_s REAL NOT NULL,
  engine TEXT NOT NULL,
  failure TEXT NOT NULL,             -- Why not, else empty
  reused TEXT NOT NULL,              -- Model whose score this is, else empty
  items INTEGER NOT NULL,            -- Of the split; n is less: stopped
  PRIMARY KEY (model, split),
  CHECK (n <= items)
);
CREATE TABLE questions (             -- Shared by all models' responses.
  split TEXT NOT NULL,
  item INTEGER NOT NULL,
  prompt TEXT NOT NULL,
  gold TEXT NOT NULL,
  PRIMARY KEY (split, item)
);
CREATE TABLE responses (
  model TEXT NOT NULL,
  split TEXT NOT NULL,
  item INTEGER NOT NULL,
  text TEXT NOT NULL,
  extracted TEXT,
  correct INTEGER NOT NULL,
  truncated INTEGER NOT NULL,        -- The prompt lost its beginning
  trouble TEXT NOT NULL,             -- The scorer's, else empty
  PRIMARY KEY (model, split, item),
  FOREIGN KEY (model, split) REFERENCES scores (model, split)
) WITHOUT ROWID;
CREATE TABLE pairs (
  iteration INTEGER NOT NULL,
  item INTEGER NOT NULL,
  prompt TEXT NOT NULL,
  chosen TEXT NOT NULL,
  rejected TEXT NOT NULL,
  chosen_digest TEXT NOT NULL REFERENCES programs (digest),
  rejected_digest TEXT REFERENCES programs (digest),
  PRIMARY KEY (iteration, item)
);
CREATE TABLE steps (
  iteration INTEGER NOT NULL,
  step INTEGER NOT NULL,
  metrics TEXT NOT NULL,             -- JSON, TRL's names
  PRIMARY KEY (iteration, step)
);
CREATE TABLE timings (
  arm TEXT NOT NULL,
  iteration INTEGER NOT NULL,
  stage TEXT NOT NULL,
  seconds REAL NOT NULL
);
CREATE TABLE done (                  -- Stages that need not run again.
  arm TEXT NOT NULL,
  iteration INTEGER NOT NULL,
  stage TEXT NOT NULL,
  PRIMARY KEY (arm, iteration, stage)
);
