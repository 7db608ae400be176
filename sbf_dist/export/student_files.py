"""Names of the files of a saved student; they load nothing."""

WEIGHTS = "weights.safetensors"
PLAN = "plan.json"
CARD = "card.json"
ONNX = "student.onnx"
MODEL_CARD = "README.md"
EXPORTED_PROGRAM = "student.pt2"
