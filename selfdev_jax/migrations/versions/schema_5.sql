-- Schema 5, as selfdev_jax/schema.py described it.
CREATE TABLE meta (
  key TEXT NOT NULL,
  value TEXT NOT NULL,
  PRIMARY KEY (key)
);
CREATE TABLE sessions (
  id INTEGER NOT NULL,
  provenance TEXT NOT NULL,
  PRIMARY KEY (id)
);
CREATE TABLE questions (
  split TEXT NOT NULL,
  item INTEGER NOT NULL,
  prompt TEXT NOT NULL,
  gold TEXT NOT NULL,
  PRIMARY KEY (split, item)
);
CREATE TABLE activities (
  id INTEGER NOT NULL,
  session INTEGER NOT NULL,
  arm TEXT NOT NULL,
  iteration INTEGER NOT NULL,
  stage TEXT NOT NULL,
  seed INTEGER NOT NULL,
  started FLOAT,
  seconds FLOAT NOT NULL,
  writing_s FLOAT NOT NULL,
  done INTEGER NOT NULL,
  total INTEGER,
  unit TEXT NOT NULL,
  finished INTEGER NOT NULL,
  PRIMARY KEY (id),
  FOREIGN KEY (session) REFERENCES sessions (id)
);
CREATE TABLE factories (
  iteration INTEGER NOT NULL,
  digest TEXT NOT NULL,
  activity INTEGER NOT NULL,
  PRIMARY KEY (iteration),
  FOREIGN KEY (activity) REFERENCES activities (id)
);
CREATE TABLE steps (
  iteration INTEGER NOT NULL,
  step INTEGER NOT NULL,
  metrics TEXT NOT NULL,
  activity INTEGER NOT NULL,
  PRIMARY KEY (iteration, step),
  FOREIGN KEY (activity) REFERENCES activities (id)
);
CREATE TABLE done (
  arm TEXT NOT NULL,
  iteration INTEGER NOT NULL,
  stage TEXT NOT NULL,
  activity INTEGER NOT NULL,
  PRIMARY KEY (arm, iteration, stage),
  FOREIGN KEY (activity) REFERENCES activities (id)
);
CREATE TABLE completions (
  arm TEXT NOT NULL,
  iteration INTEGER NOT NULL,
  item INTEGER NOT NULL,
  text TEXT NOT NULL,
  finished INTEGER NOT NULL,
  engine TEXT NOT NULL,
  factory INTEGER NOT NULL,
  activity INTEGER NOT NULL,
  PRIMARY KEY (arm, iteration, item),
  FOREIGN KEY (factory) REFERENCES factories (iteration),
  FOREIGN KEY (activity) REFERENCES activities (id)
);
CREATE TABLE programs (
  digest TEXT NOT NULL,
  arm TEXT NOT NULL,
  iteration INTEGER NOT NULL,
  item INTEGER NOT NULL,
  activity INTEGER NOT NULL,
  stats TEXT NOT NULL,
  fingerprint BLOB NOT NULL,
  program TEXT NOT NULL,
  PRIMARY KEY (digest),
  FOREIGN KEY (arm, iteration, item)
    REFERENCES completions (arm, iteration, item),
  FOREIGN KEY (activity) REFERENCES activities (id)
);
CREATE TABLE verdicts (
  arm TEXT NOT NULL,
  iteration INTEGER NOT NULL,
  item INTEGER NOT NULL,
  digest TEXT,
  stage TEXT NOT NULL,
  code TEXT NOT NULL,
  activity INTEGER NOT NULL,
  message TEXT NOT NULL,
  source TEXT NOT NULL,
  PRIMARY KEY (arm, iteration, item),
  FOREIGN KEY (arm, iteration, item)
    REFERENCES completions (arm, iteration, item),
  FOREIGN KEY (digest) REFERENCES programs (digest),
  FOREIGN KEY (activity) REFERENCES activities (id)
);
CREATE INDEX verdicts_digest ON verdicts (digest, arm, iteration, item);
CREATE INDEX verdicts_reason ON verdicts (arm, iteration, stage, code);
CREATE TABLE candidates (
  arm TEXT NOT NULL,
  iteration INTEGER NOT NULL,
  position INTEGER NOT NULL,
  digest TEXT NOT NULL,
  activity INTEGER NOT NULL,
  PRIMARY KEY (arm, iteration, position),
  FOREIGN KEY (digest) REFERENCES programs (digest),
  FOREIGN KEY (activity) REFERENCES activities (id)
);
CREATE INDEX candidates_digest ON candidates (digest);
CREATE TABLE scores (
  model TEXT NOT NULL,
  split TEXT NOT NULL CHECK (split IN ('dev', 'test')),
  n INTEGER NOT NULL,
  correct INTEGER,
  merge_s FLOAT NOT NULL,
  evaluate_s FLOAT NOT NULL,
  engine TEXT NOT NULL,
  failure TEXT NOT NULL,
  reused TEXT,
  items INTEGER NOT NULL,
  program TEXT,
  weights TEXT NOT NULL,
  at FLOAT,
  activity INTEGER NOT NULL,
  PRIMARY KEY (model, split),
  FOREIGN KEY (reused, split) REFERENCES scores (model, split),
  CONSTRAINT answered CHECK (n <= items),
  FOREIGN KEY (program) REFERENCES programs (digest),
  FOREIGN KEY (activity) REFERENCES activities (id)
);
CREATE INDEX scores_program ON scores (program, split);
CREATE TABLE pairs (
  iteration INTEGER NOT NULL,
  item INTEGER NOT NULL,
  prompt TEXT NOT NULL,
  chosen TEXT NOT NULL,
  rejected TEXT NOT NULL,
  chosen_digest TEXT NOT NULL,
  rejected_digest TEXT,
  arm TEXT NOT NULL,
  chosen_iteration INTEGER NOT NULL,
  chosen_item INTEGER NOT NULL,
  rejected_item INTEGER NOT NULL,
  activity INTEGER NOT NULL,
  PRIMARY KEY (iteration, item),
  FOREIGN KEY (arm, chosen_iteration, chosen_item)
    REFERENCES completions (arm, iteration, item),
  FOREIGN KEY (arm, iteration, rejected_item)
    REFERENCES completions (arm, iteration, item),
  FOREIGN KEY (chosen_digest) REFERENCES programs (digest),
  FOREIGN KEY (rejected_digest) REFERENCES programs (digest),
  FOREIGN KEY (activity) REFERENCES activities (id)
);
CREATE INDEX pairs_chosen ON pairs (chosen_digest);
CREATE INDEX pairs_rejected ON pairs (rejected_digest);
CREATE TABLE responses (
  model TEXT NOT NULL,
  split TEXT NOT NULL,
  item INTEGER NOT NULL,
  text TEXT NOT NULL,
  extracted TEXT,
  correct INTEGER NOT NULL,
  truncated INTEGER NOT NULL,
  trouble TEXT NOT NULL,
  activity INTEGER NOT NULL,
  PRIMARY KEY (model, split, item),
  FOREIGN KEY (model, split) REFERENCES scores (model, split),
  FOREIGN KEY (split, item) REFERENCES questions (split, item),
  FOREIGN KEY (activity) REFERENCES activities (id)
) WITHOUT ROWID;
CREATE INDEX responses_truncated ON responses (split, item) WHERE truncated;
CREATE INDEX responses_trouble ON responses (split, trouble)
WHERE trouble != '';
