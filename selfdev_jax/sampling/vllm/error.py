"""What goes wrong between this process and vLLM."""


class EngineError(Exception):
  """This engine cannot be trusted any more; another may do."""
