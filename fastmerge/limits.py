"""How much of a stranger's files is taken: every bound in one place, with the largest seen in use.

What is larger is refused in one line, before memory or minutes are spent on it.
"""

MAX_HEADER_BYTES = 100_000_000  # of a safetensors header, the library's own limit; of an index
MAX_CONFIG_BYTES = 16 << 20  # the largest config.json on the Hub takes 0.5 MB
MAX_REF_BYTES = 256  # of a branch in the Hub's cache: a commit's hash takes 40
MAX_NESTING = 100  # of mappings and lists in JSON; the deepest config has 8
MAX_OFFSET = 2**63 - 1  # in a file, and of any size: they are signed 64-bit
MAX_DIMENSIONS = 64  # of a tensor, as in NumPy and torch; without a bound its product is quadratic
MAX_ADAPTED_LETTERS = 512  # of the name of a tensor that an adapter is for; the longest has 120
MAX_PATH_LETTERS = 4096  # that Linux takes; in a longer one nothing lies
MAX_LAYERS = 10_000  # the deepest published model has 1000
MAX_FILE_BYTES = 256 << 20  # beside the weights: the largest tokenizer file takes 35 MB
MAX_TOKENIZER_BYTES = 64 << 20  # of a tokenizer.json that is read and not only copied
# Of one tokenizer; the largest in use, XLM-V's, has 901 629. A hole of 2^22 ids in one of pieces
# took 11 s and 2.1 GiB, and a file of 300 MB, to fill.
MAX_TOKENS = 1 << 20
MAX_TOTAL_BYTES = 1 << 30  # beside the weights in all
MAX_DIFFERENCES = 10_000  # that `verify` tells one by one; the others are counted
MAX_ENTRIES = 10_000  # a folder with more files is no model's: somebody's home, a data set
MAX_DEPTH = 16  # of folders in a model's folder: chat templates and modules lie one deep
MAX_CARD_BYTES = 1 << 20  # of a README.md that is read for what the output's card says
# Of its front matter's keys that are read: 1100 languages take 7 KB, and PyYAML takes a second for
# "[" so often.
MAX_FRONT_LETTERS = 1 << 14
MAX_RANK = 1 << 20  # of an adapter
# Of an expression of an adapter; the longest seen, of a layer-wise search's ranks, has 400.
MAX_PATTERN_LETTERS = 4096
MAX_PATTERNS_LETTERS = 1 << 18  # of one setting's: compiling them takes a second
MAX_PATTERN_REPEATS = 3  # matching is of this degree in a name's length
MAX_PATTERN_STEPS = 2 * 10**8  # of one setting's matches, by a count that is too high: 15 seconds
MAX_COMPARED_PIECES = 20_000_000  # pairs, of one tensor of a distributed checkpoint: 20 s
MAX_MODULES_BYTES = 1 << 20  # of sentence-transformers' modules.json
# Of a recipe, a schedule, a task file, a scorer's own text: of the public ones the largest takes
# 0.1 MB, and PyYAML 8 s for 1 MB of short values.
MAX_RECIPE_BYTES = 1 << 20
MAX_NUMBER_LETTERS = 1000  # 1:1:1:..., of base 60, takes PyYAML the square of its length
MAX_RECIPE_VALUES = 1_000_000  # once every alias is written out
# Of the folders of tasks that an evaluation names; the harness's own has 16 334 entries, of which
# the tasks take 7 MB.
MAX_TASK_ENTRIES = 100_000
MAX_TASKS_BYTES = 16 << 20
MAX_JOURNAL_BYTES = 1 << 30  # of a run: a thousand states over 10 000 items each take 200 MB;
# of a part: a million tensors take 200 MB
MAX_MANIFEST_BYTES = 1 << 28  # of a merge in parts
# Of one split of an evaluation's data, unpacked; the largest takes 50 MB.
MAX_DATA_BYTES = 512 << 20
# Of one picture of tensors by layer and kind, 30 pixels each; a mixture of 384 experts has 70 000.
MAX_PICTURE_CELLS = 100_000
MAX_PICTURE_SIDE = 2000
# Of a name in a picture: one of 20 000 takes half a minute and 300 MB to draw.
MAX_LABEL_LETTERS = 60
