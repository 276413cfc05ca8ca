def merge(base, task_vectors):
  return base + 0.3 * sum(task_vectors)
