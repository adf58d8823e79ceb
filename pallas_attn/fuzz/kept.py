"""Seeds of calls that once failed: they always run."""

KEPT: dict[str, tuple[int, ...]] = {
    "xla": (
        3,  # soft cap: a NaN query that sees no key, in the gradient of keys
        23,  # log gates of -3e38, a part of a whole row's scores
        63,  # a key that a bias takes away, NaN in it
        95,  # -1e9 in what all keys of a query share
        400004,  # alpha of 1.001, whose 0.001 had been rounded with the 1
        540684,  # float16: sums of what is below its normal numbers, not the library's
        540920,  # a tanh that is 1 but for its last digits, nor this
        541532,  # float64 with a term that was float32, nor this
        541002,  # NaN whose every weight dropout took, nor this
        560291,  # alpha of 1: logarithms of weights that are all but equal, nor this
        560954,  # gates that differences of the truth push past 0, nor this
        571230,  # a NaN value that all rows of one key head see, and showed in none
        580110,  # values of width 1: of 0 / 0 XLA for CPU made 0, and NaN was hidden
        580616,  # float64: -1e9 of a whole row, which rounded the truth, nor this
        610025,  # a narrow slope, its gradient in two parts that were rounded each
        610941,  # float64: a float32 bias that batch entries share, summed in float32
        611442,  # hvp of entmax: a key came within the truth's step, not the library's
        200349,  # no batch entry, but gates that each would share
    ),
    "kernels": (
        40,  # bfloat16: an lse of 3e8, which one float32 number held to 16
        1169,  # a learned alpha of 2: the log of a weight that was 0 but for rounding
        1260,  # float16, a scale of 3e6: the query's gradient was rounded before it
        400004,  # entmax at an offset of 2^20: a multiply-add in one pass alone
        530004,  # two parts of what a whole row has: the same, of their sum
        530234,  # delta rounded by itself, where dP nearly cancels: not the library's
        331118,  # NaN whose every weight dropout took: not the library's
        331297,  # the log of 1 + 4e-9: float32 has none
        331408,  # entmax: sum u of a threshold an ulp away, where a weight is nearly 0
        331506,  # -1e9 of keys beside -1e4 of their query
        341268,  # float16: a gradient that noise makes infinite, not the library's
        342021,  # ALiBi from 2^20 beyond all keys: entmax had no weight at all
        342238,  # a batch entry without a query, whose window began at a NaN key
        532317,  # a tanh, off by two units and more: not the library's
        551982,  # bfloat16, alpha 1.9: a weight of 1e-4 too many, whose u was 0.4
        381314,  # entmax of a row whose every key has -1e9: no block had a threshold
        381041,  # narrow slopes of one leading axis of two: rounded before their sum
        602304,  # top_k: more keys near the k-th than lists hold, in blocks of 64
        602779,  # the same, of keys that gates of -6e4 took: the largest was lost
        550048,  # dS below float16's normal numbers, nor this
        7,  # a key that a bias takes away, NaN in it
        1221,  # the largest key alone, whose score was rounded otherwise elsewhere
        100040,  # top_k: a total that is NaN made keys that nobody wrote candidates
        3025,  # slopes: a multiply-add in one pass, a product and a sum in another
        200289,  # co_alibi: scores of thousands, a weight of 1 that was 1.0005
        200409,  # a mean by u that was of the threshold before the last step
        800040,  # a table that given positions look up: its gradient as atomics came
        800073,  # the same of entmax, at positions of its own
    ),
}
