-- What schema 6 added, as selfdev_jax/schema.py described it.
CREATE TABLE incidents (
  id INTEGER NOT NULL,
  kind TEXT NOT NULL,
  worker TEXT NOT NULL,
  host TEXT NOT NULL,
  detail TEXT NOT NULL,
  at FLOAT NOT NULL,
  activity INTEGER NOT NULL,
  PRIMARY KEY (id),
  FOREIGN KEY (activity) REFERENCES activities (id)
);
