// Made from explorer/*.ts by "npm run build"; do not edit. Sources: f888a48b85ca136bb9e9337e017c44ff7cdb78b0a6dea0e715c7572cb132525b
"use strict";
var seqparExplorer = (() => {
  var __defProp = Object.defineProperty;
  var __getOwnPropDesc = Object.getOwnPropertyDescriptor;
  var __getOwnPropNames = Object.getOwnPropertyNames;
  var __hasOwnProp = Object.prototype.hasOwnProperty;
  var __export = (target, all) => {
    for (var name in all)
      __defProp(target, name, { get: all[name], enumerable: true });
  };
  var __copyProps = (to, from, except, desc) => {
    if (from && typeof from === "object" || typeof from === "function") {
      for (let key of __getOwnPropNames(from))
        if (!__hasOwnProp.call(to, key) && key !== except)
          __defProp(to, key, { get: () => from[key], enumerable: !(desc = __getOwnPropDesc(from, key)) || desc.enumerable });
    }
    return to;
  };
  var __toCommonJS = (mod) => __copyProps(__defProp({}, "__esModule", { value: true }), mod);

  // main.ts
  var main_exports = {};
  __export(main_exports, {
    answer: () => answer,
    shown: () => shown
  });

  // from_python.json
  var from_python_default = {
    lines: {
      shards: {
        file: "seqpar_ref/attention.py",
        function: "DistributedAttention.exchange_and_attend",
        lines: [
          "qkv = unchecked_qkv_to_heads(query, key, value, plan, group, layout, self.wire)"
        ]
      },
      "pack in order": {
        file: "seqpar_ref/wire.py",
        function: "Cut.pack",
        lines: [
          "return self._without_kept(tensors[0].contiguous())"
        ]
      },
      "pack strided": {
        file: "seqpar_ref/wire.py",
        function: "Cut.pack",
        lines: [
          "block.in_buffer(buffer, begin).copy_(block.in_tensor(tensor))"
        ]
      },
      "pack ragged": {
        file: "seqpar_ref/ragged.py",
        function: "RaggedRows.write",
        lines: [
          "write_rows(buffer.view(-1, self.row), self._written[stage], rows)"
        ]
      },
      "in flight": {
        file: "seqpar_ref/direct.py",
        function: "exchange",
        lines: [
          "work = group.all_to_all_single(arriving, sent, *splits, async_op or route.keeps)"
        ]
      },
      kept: {
        file: "seqpar_ref/routes.py",
        function: "Route.copy_kept",
        lines: [
          "for tensor, result, (block, block_there) in zip(tensors, received.tensors, blocks, strict=True):",
          "    block_there.in_tensor(result).copy_(block.in_tensor(tensor))"
        ]
      },
      arrived: {
        file: "seqpar_ref/direct.py",
        function: "exchange",
        lines: [
          "work.wait()"
        ]
      },
      "unpack in order": {
        file: "seqpar_ref/wire.py",
        function: "Cut.unpack",
        lines: [
          "if self.in_order:",
          "    return tensors"
        ]
      },
      "unpack strided": {
        file: "seqpar_ref/wire.py",
        function: "Cut.unpack",
        lines: [
          "for blocks in self.blocks:",
          "    for block in blocks or ():",
          "        block.in_tensor(tensors[block.part]).copy_(block.in_buffer(buffer))"
        ]
      },
      "unpack ragged": {
        file: "seqpar_ref/ragged.py",
        function: "RaggedRows.read",
        lines: [
          "torch.index_select(rows, 0, positions, out=tensor.view(-1, self.row))"
        ]
      },
      attention: {
        file: "seqpar_ref/attention.py",
        function: "DistributedAttention.exchange_and_attend",
        lines: [
          "result = attend(*qkv, own)"
        ]
      },
      uses: {
        file: "seqpar_ref/own_heads.py",
        function: "own_heads",
        lines: [
          "kv_of_query = tuple(head // ratio - kv.start for head in query)"
        ]
      },
      expand: {
        file: "seqpar_ref/own_heads.py",
        function: "OwnAttention.__call__",
        lines: [
          "if own.expand:",
          "    key, value = (_expanded(tensor, own.kv_of_query, self.layout) for tensor in (key, value))"
        ]
      },
      "no heads": {
        file: "seqpar_ref/own_heads.py",
        function: "OwnAttention.__call__",
        lines: [
          "if not own.query:",
          "    return connected(_nothing(query, key, value), *self.others)"
        ]
      },
      back: {
        file: "seqpar_ref/attention.py",
        function: "DistributedAttention.exchange_and_attend",
        lines: [
          "return unchecked_heads_to_sequence(result, plan, group, layout)"
        ]
      }
    },
    bounds: {
      fusedUpTo: 1048576,
      mostRanks: 1048576,
      drawnRanks: 16
    },
    colours: {
      "1": [
        [
          "#56B4E9",
          "black"
        ]
      ],
      "2": [
        [
          "#56B4E9",
          "black"
        ],
        [
          "#E69F00",
          "black"
        ]
      ],
      "3": [
        [
          "#56B4E9",
          "black"
        ],
        [
          "#E69F00",
          "black"
        ],
        [
          "#009E73",
          "black"
        ]
      ],
      "4": [
        [
          "#56B4E9",
          "black"
        ],
        [
          "#E69F00",
          "black"
        ],
        [
          "#009E73",
          "black"
        ],
        [
          "#F0E442",
          "black"
        ]
      ],
      "5": [
        [
          "#56B4E9",
          "black"
        ],
        [
          "#E69F00",
          "black"
        ],
        [
          "#009E73",
          "black"
        ],
        [
          "#F0E442",
          "black"
        ],
        [
          "#CC79A7",
          "black"
        ]
      ],
      "6": [
        [
          "#56B4E9",
          "black"
        ],
        [
          "#E69F00",
          "black"
        ],
        [
          "#009E73",
          "black"
        ],
        [
          "#F0E442",
          "black"
        ],
        [
          "#CC79A7",
          "black"
        ],
        [
          "#0072B2",
          "white"
        ]
      ],
      "7": [
        [
          "#56B4E9",
          "black"
        ],
        [
          "#E69F00",
          "black"
        ],
        [
          "#009E73",
          "black"
        ],
        [
          "#F0E442",
          "black"
        ],
        [
          "#CC79A7",
          "black"
        ],
        [
          "#0072B2",
          "white"
        ],
        [
          "#D55E00",
          "white"
        ]
      ],
      "8": [
        [
          "#56B4E9",
          "black"
        ],
        [
          "#E69F00",
          "black"
        ],
        [
          "#009E73",
          "black"
        ],
        [
          "#F0E442",
          "black"
        ],
        [
          "#CC79A7",
          "black"
        ],
        [
          "#0072B2",
          "white"
        ],
        [
          "#D55E00",
          "white"
        ],
        [
          "#BBBBBB",
          "black"
        ]
      ],
      "9": [
        [
          "#00224e",
          "white"
        ],
        [
          "#1a386f",
          "white"
        ],
        [
          "#434e6c",
          "white"
        ],
        [
          "#61656f",
          "white"
        ],
        [
          "#7d7c78",
          "black"
        ],
        [
          "#9b9476",
          "black"
        ],
        [
          "#bcae6c",
          "black"
        ],
        [
          "#dec958",
          "black"
        ],
        [
          "#fee838",
          "black"
        ]
      ],
      "10": [
        [
          "#00224e",
          "white"
        ],
        [
          "#123570",
          "white"
        ],
        [
          "#3b496c",
          "white"
        ],
        [
          "#575d6d",
          "white"
        ],
        [
          "#707173",
          "white"
        ],
        [
          "#8a8678",
          "black"
        ],
        [
          "#a59c74",
          "black"
        ],
        [
          "#c3b369",
          "black"
        ],
        [
          "#e1cc55",
          "black"
        ],
        [
          "#fee838",
          "black"
        ]
      ],
      "11": [
        [
          "#00224e",
          "white"
        ],
        [
          "#083370",
          "white"
        ],
        [
          "#35456c",
          "white"
        ],
        [
          "#4f576c",
          "white"
        ],
        [
          "#666970",
          "white"
        ],
        [
          "#7d7c78",
          "black"
        ],
        [
          "#948e77",
          "black"
        ],
        [
          "#aea371",
          "black"
        ],
        [
          "#c8b866",
          "black"
        ],
        [
          "#e5cf52",
          "black"
        ],
        [
          "#fee838",
          "black"
        ]
      ],
      "12": [
        [
          "#00224e",
          "white"
        ],
        [
          "#013271",
          "white"
        ],
        [
          "#2f426d",
          "white"
        ],
        [
          "#48526c",
          "white"
        ],
        [
          "#5e636f",
          "white"
        ],
        [
          "#727374",
          "black"
        ],
        [
          "#878478",
          "black"
        ],
        [
          "#9d9576",
          "black"
        ],
        [
          "#b6a96f",
          "black"
        ],
        [
          "#cebc63",
          "black"
        ],
        [
          "#e7d150",
          "black"
        ],
        [
          "#fee838",
          "black"
        ]
      ],
      "13": [
        [
          "#00224e",
          "white"
        ],
        [
          "#003170",
          "white"
        ],
        [
          "#2a3f6d",
          "white"
        ],
        [
          "#434e6c",
          "white"
        ],
        [
          "#575d6d",
          "white"
        ],
        [
          "#6a6c71",
          "white"
        ],
        [
          "#7d7c78",
          "black"
        ],
        [
          "#918b78",
          "black"
        ],
        [
          "#a59c74",
          "black"
        ],
        [
          "#bcae6c",
          "black"
        ],
        [
          "#d2c060",
          "black"
        ],
        [
          "#e9d34e",
          "black"
        ],
        [
          "#fee838",
          "black"
        ]
      ],
      "14": [
        [
          "#00224e",
          "white"
        ],
        [
          "#00306f",
          "white"
        ],
        [
          "#263d6e",
          "white"
        ],
        [
          "#3e4b6c",
          "white"
        ],
        [
          "#51586d",
          "white"
        ],
        [
          "#636670",
          "white"
        ],
        [
          "#747475",
          "black"
        ],
        [
          "#858279",
          "black"
        ],
        [
          "#989277",
          "black"
        ],
        [
          "#aca172",
          "black"
        ],
        [
          "#c0b16a",
          "black"
        ],
        [
          "#d5c25e",
          "black"
        ],
        [
          "#ebd44b",
          "black"
        ],
        [
          "#fee838",
          "black"
        ]
      ],
      "15": [
        [
          "#00224e",
          "white"
        ],
        [
          "#002f6d",
          "white"
        ],
        [
          "#213b6e",
          "white"
        ],
        [
          "#39486c",
          "white"
        ],
        [
          "#4c556c",
          "white"
        ],
        [
          "#5d616e",
          "white"
        ],
        [
          "#6c6e72",
          "white"
        ],
        [
          "#7d7c78",
          "black"
        ],
        [
          "#8e8978",
          "black"
        ],
        [
          "#9f9775",
          "black"
        ],
        [
          "#b1a570",
          "black"
        ],
        [
          "#c5b568",
          "black"
        ],
        [
          "#d9c55c",
          "black"
        ],
        [
          "#edd54a",
          "black"
        ],
        [
          "#fee838",
          "black"
        ]
      ],
      "16": [
        [
          "#00224e",
          "white"
        ],
        [
          "#002e6c",
          "white"
        ],
        [
          "#1e3a6f",
          "white"
        ],
        [
          "#35456c",
          "white"
        ],
        [
          "#47516c",
          "white"
        ],
        [
          "#575d6d",
          "white"
        ],
        [
          "#666970",
          "white"
        ],
        [
          "#757575",
          "black"
        ],
        [
          "#848279",
          "black"
        ],
        [
          "#948e77",
          "black"
        ],
        [
          "#a59c74",
          "black"
        ],
        [
          "#b7a96e",
          "black"
        ],
        [
          "#c8b866",
          "black"
        ],
        [
          "#dbc75a",
          "black"
        ],
        [
          "#eed649",
          "black"
        ],
        [
          "#fee838",
          "black"
        ]
      ]
    }
  };

  // values.ts
  function literal(text) {
    const trimmed = text.trim();
    if (trimmed === "") return null;
    if (/^[+-]?\d+$/.test(trimmed)) return BigInt(trimmed.replace("+", ""));
    if (/^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$/.test(trimmed)) return Number(trimmed);
    return trimmed;
  }
  function literals(text) {
    if (!text.includes(",")) return literal(text);
    return text.replace(/,\s*$/, "").split(",").map(literal);
  }
  function repr(value) {
    if (value === null) return "None";
    if (Array.isArray(value)) return `[${value.map(repr).join(", ")}]`;
    if (typeof value === "string") return reprOfString(value);
    if (typeof value === "number") return reprOfFloat(value);
    return String(value);
  }
  function kindOf(value) {
    if (value === null) return "NoneType";
    if (Array.isArray(value)) return "list";
    return { bigint: "int", number: "float", string: "str" }[typeof value];
  }
  function reprOfString(text) {
    const quote = text.includes("'") && !text.includes('"') ? '"' : "'";
    const escaped = text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll("	", "\\t");
    return quote + (quote === "'" ? escaped.replaceAll("'", "\\'") : escaped) + quote;
  }
  function reprOfFloat(value) {
    if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
    if (Object.is(value, -0)) return "-0.0";
    const [digits, exponent] = value.toExponential().split("e");
    const power = Number(exponent);
    if (value !== 0 && (power < -4 || power >= 16)) {
      return `${digits}e${power < 0 ? "-" : "+"}${String(Math.abs(power)).padStart(2, "0")}`;
    }
    return Number.isInteger(value) ? `${value}.0` : String(value);
  }

  // plan.ts
  var SeqparError = class extends Error {
    /** As in Python, str(error) is two lines: what is wrong, and what to change. */
    constructor(kind, wrong, change) {
      super(`${wrong}
  ${change}`);
      this.kind = kind;
    }
    kind;
  };
  var MOST_RANKS = BigInt(from_python_default.bounds.mostRanks);
  var POLICIES = ["auto", "balanced", "groups"];
  var ITEM_SIZES = { float64: 8n, float32: 4n, bfloat16: 2n, float16: 2n };
  var count = (run) => run.end - run.first;
  var sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
  function makePlan(request) {
    const [ranks, heads] = integers("ranks, heads", [request.ranks, request.heads]);
    if (ranks < 1n) throw planError("a plan for 0 ranks divides nothing.", "Use at least 1 rank.");
    if (ranks > MOST_RANKS) {
      throw planError(`a plan for ${ranks} ranks is too large.`, `Use at most ${MOST_RANKS} ranks.`);
    }
    const kvHeads = checkedKvHeads(heads, request.kv_heads ?? heads);
    if (!POLICIES.includes(request.policy)) {
      throw planError(`${repr(request.policy)} is no policy.`, 'Use "auto", "balanced" or "groups".');
    }
    const tokens = tokensByRank(request.tokens, ranks);
    const groups = divide(kvHeads, ranks).map((share) => share * (heads / kvHeads));
    const candidates = {
      balanced: planOf(tokens, divide(heads, ranks), kvHeads),
      groups: planOf(tokens, groups, kvHeads)
    };
    if (request.policy !== "auto") return candidates[request.policy];
    const [cost, other] = [costOf(candidates.balanced), costOf(candidates.groups)];
    const fewerBytes = other[0] === cost[0] && other[1] < cost[1];
    return other[0] < cost[0] || fewerBytes ? candidates.groups : candidates.balanced;
  }
  function vectors(plan, heads) {
    return plan.tokenRuns.map(
      (tokens, sender) => plan.headRuns[heads].map((held, receiver) => sender === receiver ? 0 : count(tokens) * count(held))
    );
  }
  function checkedSizes(plan, batch, headDim, dtype) {
    const [rows, dim] = integers("batch, head_dim, value_dim", [batch, headDim, headDim]);
    const size = Object.hasOwn(ITEM_SIZES, dtype) ? ITEM_SIZES[dtype] : void 0;
    if (size === void 0) {
      throw planError(`dtype is ${repr(dtype)}.`, "Pass a torch.dtype, such as torch.bfloat16.");
    }
    const largest = rows > dim ? rows : dim;
    if (4n * largest * rows * BigInt(plan.tokens) * BigInt(plan.heads) * size >= 2n ** 63n) {
      throw planError(`batch ${rows}, head dim ${dim} are more than can be counted.`, "Use smaller ones.");
    }
    return [rows, dim, size];
  }
  function bytesOf(plan, batch, headDim, itemSize) {
    const [query, kv] = [vectors(plan, "query"), vectors(plan, "kv")];
    return query.map(
      (row, sender) => row.map((sent, receiver) => {
        const travelling = sent + 2 * kv[sender][receiver] + query[receiver][sender];
        return batch * itemSize * headDim * BigInt(travelling);
      })
    );
  }
  function table(plan) {
    let shown2 = plan.tokenRuns.map((_, rank) => rank);
    if (plan.ranks > 16) shown2 = [...shown2.slice(0, 8), ...shown2.slice(-4)];
    const rows = [["rank", "tokens", "query heads", "kv heads"]];
    for (const rank of shown2) {
      const owned = [plan.tokenRuns[rank], plan.headRuns.query[rank], plan.headRuns.kv[rank]];
      rows.push([String(rank), ...owned.map(describe)]);
    }
    if (plan.ranks > 16) rows.splice(9, 0, ["...", "...", "...", "..."]);
    const widths = [0, 1, 2, 3].map((column) => Math.max(...rows.map((row) => row[column].length)));
    const lines = rows.map((row) => row.map((cell, column) => cell.padStart(widths[column])).join("  "));
    const sizes = `${plan.tokens} tokens, ${plan.heads} query heads, ${plan.kvHeads} kv heads`;
    return [`${plan.ranks} ranks, ${sizes}`, ...lines].join("\n");
  }
  function describe(run) {
    if (count(run) === 0) return "-";
    return count(run) === 1 ? String(run.first) : `${run.first}-${run.end - 1}`;
  }
  function planError(wrong, change) {
    return new SeqparError("PlanError", wrong, change);
  }
  function integers(name, values) {
    if (!Array.isArray(values)) {
      const shown2 = repr(values).split(/\s+/).join(" ").trim();
      throw planError(`${name} is ${shown2}.`, "Use integers: one, or a list of them.");
    }
    return values.map((value) => {
      if (typeof value !== "bigint") {
        throw planError(
          `${name} holds ${repr(value)}, a ${kindOf(value)}.`,
          "Use integers, not floats or bools."
        );
      }
      if (value < 0n) throw planError(`${name} holds ${value}.`, "Use integers of at least 0.");
      return value;
    });
  }
  function checkedKvHeads(heads, given) {
    const [kvHeads] = integers("kv_heads", [given]);
    if (heads < 1n) throw planError("0 query heads attend to nothing.", "Use at least 1 query head.");
    if (kvHeads < 1n || heads % kvHeads !== 0n) {
      const most = heads < 4096n ? Number(heads) : 4096;
      const legal = Array.from({ length: most }, (_, i) => i + 1).filter((d) => heads % BigInt(d) === 0n);
      throw planError(
        `${kvHeads} kv heads cannot serve ${heads} query heads in equal groups.`,
        `Use a number of kv heads that divides ${heads}: ${legal.join(", ")}.`
      );
    }
    return kvHeads;
  }
  function tokensByRank(tokens, ranks) {
    if (typeof tokens === "bigint") return divide(integers("tokens", [tokens])[0], ranks);
    const byRank = integers("tokens", tokens);
    if (BigInt(byRank.length) !== ranks) {
      throw planError(
        `tokens has ${byRank.length} entries for ${ranks} ranks.`,
        `Give one count for each of the ${ranks} ranks, zeros included, or the total.`
      );
    }
    return byRank;
  }
  function divide(things, ranks) {
    const [share, leftOver] = [things / ranks, things % ranks];
    return Array.from({ length: Number(ranks) }, (_, rank) => share + (BigInt(rank) < leftOver ? 1n : 0n));
  }
  function planOf(tokensByRank2, headsByRank, kvHeads) {
    const add = (total, entry) => total + entry;
    const [tokens, heads] = [tokensByRank2.reduce(add, 0n), headsByRank.reduce(add, 0n)];
    if (tokens * heads * BigInt(tokensByRank2.length) >= 2n ** 48n) {
      throw planError(
        `${tokens} tokens of ${heads} heads on ${tokensByRank2.length} ranks are too many to count.`,
        "Keep tokens times heads times ranks below 2**48."
      );
    }
    const query = runsOf(headsByRank.map(Number));
    return {
      ranks: tokensByRank2.length,
      tokens: Number(tokens),
      heads: Number(heads),
      kvHeads: Number(kvHeads),
      tokenRuns: runsOf(tokensByRank2.map(Number)),
      headRuns: { query, ...kvRuns(query, Number(heads / kvHeads)) }
    };
  }
  function runsOf(counts) {
    let end = 0;
    return counts.map((own) => ({ first: end, end: end += own }));
  }
  function kvRuns(query, ratio) {
    const kv = query.map((run) => {
      const first = Math.floor(run.first / ratio);
      return { first, end: count(run) > 0 ? Math.ceil(run.end / ratio) : first };
    });
    let heldBelow = 0;
    const once = kv.map((run) => {
      const first = Math.max(run.first, heldBelow);
      heldBelow = Math.max(heldBelow, run.end);
      return { first, end: Math.max(run.end, first) };
    });
    return { kv, "kv once": once };
  }
  function costOf(plan) {
    const [tokens, query, kv] = [plan.tokenRuns, plan.headRuns.query, plan.headRuns.kv].map(
      (r) => r.map(count)
    );
    const copies = sum(kv);
    let [fullest, busiest] = [0, 0];
    for (let rank = 0; rank < plan.ranks; rank++) {
      const there = tokens[rank] * (plan.heads - query[rank] + 2 * (copies - kv[rank]));
      fullest = Math.max(fullest, query[rank]);
      busiest = Math.max(busiest, there + query[rank] * (plan.tokens - tokens[rank]));
    }
    return [fullest, busiest];
  }

  // wire.ts
  var LAYOUTS = ["b s h d", "s b h d", "b h s d"];
  var FUSED_UP_TO = BigInt(from_python_default.bounds.fusedUpTo);
  function wireOf(plan, { batch, headDim, itemSize }) {
    const pairs = BigInt(Math.max(1, plan.ranks * (plan.ranks - 1)));
    const [query, kv] = [vectors(plan, "query"), vectors(plan, "kv")].map(
      (matrix) => BigInt(sum(matrix.map(sum)))
    );
    const mean = batch * itemSize * headDim * (query + 2n * kv) / pairs;
    return mean <= FUSED_UP_TO ? "fused" : "pipelined";
  }
  function routeOf(plan, rank, layout, sizes, tensors) {
    const words = layout.split(" ");
    const before = (dim) => words.slice(0, words.indexOf(dim));
    const runs = tensors.map((tensor) => runsOfTensor(plan, tensor));
    const totals = tensors.map((tensor) => totalHeads(plan, tensor));
    const ownTokens = BigInt(count(plan.tokenRuns[rank]));
    const lengths = (tokens2, heads2) => ({
      b: sizes.batch,
      s: tokens2,
      h: heads2
    });
    const product = (dims, length) => dims.reduce((total, dim) => total * length[dim], 1n);
    const heads = cutOf(
      tensors,
      runs.map((own, part) => ({
        runs: own,
        total: totals[part],
        across: sizes.batch * ownTokens * sizes.headDim,
        before: product(before("h"), lengths(ownTokens, BigInt(totals[part])))
      }))
    );
    const tokens = cutOf(
      tensors,
      runs.map((own) => ({
        runs: plan.tokenRuns,
        total: plan.tokens,
        across: sizes.batch * BigInt(count(own[rank])) * sizes.headDim,
        before: product(before("s"), lengths(BigInt(plan.tokens), BigInt(count(own[rank]))))
      }))
    );
    const kept = [heads, tokens].every((cut) => mayKeep(cut, rank, plan.ranks));
    return { byHeads: laidOut(heads, kept ? rank : null), byTokens: laidOut(tokens, kept ? rank : null) };
  }
  var runsOfTensor = (plan, tensor) => plan.headRuns[tensor === "query" || tensor === "output" ? "query" : "kv"];
  var totalHeads = (plan, tensor) => tensor === "query" || tensor === "output" ? plan.heads : plan.kvHeads;
  function cutOf(tensors, parts) {
    const alone = (part) => part.runs.length === 1 || part.before === 1n;
    if (parts.length === 1 && isOnce(parts[0]) && alone(parts[0])) return { tensors, parts, way: "in order" };
    return { tensors, parts, way: parts.every((part) => hasStep(part.runs)) ? "strided" : "ragged" };
  }
  var isOnce = (part) => sum(part.runs.map(count)) === part.total;
  function hasStep(runs) {
    const steps = runs.slice(1).map((run, i) => run.first - runs[i].first);
    return new Set(runs.map(count)).size <= 1 && new Set(steps).size <= 1;
  }
  function mayKeep({ parts, way }, rank, ranks) {
    const strided = parts.every((part) => isOnce(part) && hasStep(part.runs));
    return strided && (rank === 0 || rank === ranks - 1 || way !== "in order");
  }
  function laidOut({ tensors, parts, way }, kept) {
    const pieces = [];
    let end = 0n;
    for (let rank = 0; rank < parts[0].runs.length; rank++) {
      if (rank === kept) continue;
      parts.forEach((part, i) => {
        const begin = end;
        end += BigInt(count(part.runs[rank])) * part.across;
        pieces.push({ tensor: tensors[i], rank, begin, end });
      });
    }
    return { tensors, pieces, elements: end, kept: kept !== null, way };
  }

  // setting.ts
  var DEFAULTS = {
    ranks: "4",
    tokens: "10",
    heads: "9",
    kv_heads: "3",
    policy: "balanced",
    layout: "b s h d",
    batch: "1",
    head_dim: "8",
    dtype: "float32",
    step: "shards"
  };
  var PRESETS = {
    even: { ranks: "4", tokens: "16", heads: "8", kv_heads: "8", policy: "balanced" },
    uneven: { ranks: "4", tokens: "10", heads: "9", kv_heads: "3", policy: "balanced" },
    replicated: { ranks: "4", tokens: "12", heads: "8", kv_heads: "2", policy: "balanced" },
    "fewer heads than ranks": {
      ranks: "4",
      tokens: "3, 5, 0, 2",
      heads: "3",
      kv_heads: "",
      policy: "balanced"
    }
  };
  var DRAWN_RANKS = from_python_default.bounds.drawnRanks;
  function worldOf(setting) {
    const plan = makePlan({
      ranks: literal(setting.ranks),
      heads: literal(setting.heads),
      kv_heads: literal(setting.kv_heads),
      tokens: literals(setting.tokens),
      policy: setting.policy
    });
    const [batch, headDim, itemSize] = checkedSizes(
      plan,
      literal(setting.batch),
      literal(setting.head_dim),
      setting.dtype
    );
    const sizes = { batch, headDim, itemSize };
    checkLayout(setting.layout);
    if (headDim === 0n) {
      const shape = shapeOf(setting.layout, sizes, BigInt(plan.tokenRuns[0].end), BigInt(plan.heads));
      throw new SeqparError("ShapeError", `query is ${shape}: head dim 0.`, "Use a head dim of at least 1.");
    }
    const layout = setting.layout;
    const drawn = plan.ranks <= DRAWN_RANKS;
    return { plan, layout, sizes, exchange: drawn ? exchangeOf(plan, layout, sizes) : null };
  }
  function exchangeOf(plan, layout, sizes) {
    const wire = wireOf(plan, sizes);
    const together = wire === "fused" ? [["query", "key", "value"]] : [["query"], ["key"], ["value"]];
    const ranks = plan.tokenRuns.map((_, rank) => rank);
    const there = ranks.map((rank) => together.map((tensors) => routeOf(plan, rank, layout, sizes, tensors)));
    const back = ranks.map((rank) => routeOf(plan, rank, layout, sizes, ["output"]));
    return { plan, layout, sizes, wire, there, back };
  }
  function shapeOf(layout, { batch, headDim }, tokens, heads) {
    const length = { b: batch, s: tokens, h: heads, d: headDim };
    return `(${layout.split(" ").map((word) => length[word]).join(", ")})`;
  }
  function checkLayout(layout) {
    if (LAYOUTS.includes(layout)) return;
    const known = LAYOUTS.map(repr).join(", ");
    throw new SeqparError("LayoutError", `${repr(layout)} is no layout.`, `Use one of ${known}.`);
  }
  function fromHash(hash) {
    const given = new URLSearchParams(hash.replace(/^#/, ""));
    const known = Object.entries(DEFAULTS).map(([name, value]) => [name, given.get(name) ?? value]);
    return Object.fromEntries(known);
  }
  function toHash(setting) {
    return `#${new URLSearchParams(setting)}`;
  }

  // steps.ts
  var STEPS = [
    "shards",
    "pack",
    "in flight",
    "arrived",
    "unpack",
    "attention",
    "pack output",
    "output in flight",
    "output arrived",
    "unpack output"
  ];
  var SHOWN_ROWS = 3n;
  var SHOWN_KV_HEADS = 8;
  function framesOf(exchange, step, rank) {
    const back = [exchange.back[rank]];
    switch (step) {
      case "shards":
        return ["query", "key", "value"].map((tensor) => shard(exchange, tensor, rank));
      case "pack":
        return exchange.there[rank].flatMap((route) => buffers(exchange, route, route.byHeads, "send", rank));
      case "arrived":
        return exchange.there[rank].flatMap(
          (route) => buffers(exchange, route, route.byTokens, "receive", rank)
        );
      case "unpack":
        return ["query", "key", "value"].map((tensor) => whole(exchange, tensor, rank));
      case "attention":
        return [whole(exchange, "output", rank)];
      case "pack output":
        return back.flatMap((route) => buffers(exchange, route, route.byTokens, "send", rank));
      case "output arrived":
        return back.flatMap((route) => buffers(exchange, route, route.byHeads, "receive", rank));
      case "unpack output":
        return [shard(exchange, "output", rank)];
      default:
        return [];
    }
  }
  function flightOf(exchange, step, sender, receiver) {
    const back = step === "output in flight";
    const [tokensOf, headsOf] = back ? [receiver, sender] : [sender, receiver];
    const tensors = back ? ["output"] : ["query", "key", "value"];
    return tensors.map((tensor) => ({ tensor, tokensOf, headsOf })).filter((block) => elementsOf(exchange, block) > 0n);
  }
  function elementsOf({ plan, sizes }, { tensor, tokensOf, headsOf }) {
    const vectors2 = count(plan.tokenRuns[tokensOf]) * count(runsOfTensor(plan, tensor)[headsOf]);
    return sizes.batch * sizes.headDim * BigInt(vectors2);
  }
  function usesOf({ plan }, rank) {
    const ratio = plan.heads / plan.kvHeads;
    const query = plan.headRuns.query[rank];
    const kv = plan.headRuns.kv[rank];
    const usersOf = (head) => ({
      first: Math.max(head * ratio, query.first),
      end: Math.min((head + 1) * ratio, query.end)
    });
    const shown2 = Array.from({ length: Math.min(count(kv), SHOWN_KV_HEADS) }, (_, i) => kv.first + i);
    const sizes = [kv.first, kv.first + 1, kv.end - 1].filter((head) => head >= kv.first && head < kv.end);
    const expand = new Set(sizes.map((head) => count(usersOf(head)))).size > 1;
    return { uses: shown2.map((head) => [usersOf(head), head]), expand };
  }
  function cutsOf(exchange, step, rank) {
    if (step === "pack") return exchange.there[rank].map((route) => route.byHeads);
    if (step === "unpack") return exchange.there[rank].map((route) => route.byTokens);
    if (step === "pack output") return [exchange.back[rank].byTokens];
    return [exchange.back[rank].byHeads];
  }
  function shard(exchange, tensor, rank) {
    const { plan } = exchange;
    const runs = runsOfTensor(plan, tensor);
    const stripes = stripesOf(runs);
    const heads = spread(stripes.map(([left, right]) => right - left));
    const tokens = count(plan.tokenRuns[rank]) > 0 ? spread([1]) : spread([0]);
    const tiles = runs.flatMap((run, headsOf) => {
      const slice = sliceOf(tensor, exchange.layout, ":", `${run.first}:${run.end}`);
      return placed(exchange, { tensor, tokensOf: rank, headsOf }, tokens[0], heads[headsOf], slice);
    });
    return tensorFrame(
      exchange,
      tensor,
      BigInt(count(plan.tokenRuns[rank])),
      BigInt(totalHeads(plan, tensor)),
      tiles
    );
  }
  function whole(exchange, tensor, rank) {
    const { plan } = exchange;
    const held = count(runsOfTensor(plan, tensor)[rank]);
    const tokens = spread(plan.tokenRuns.map(count));
    const heads = spread([held]);
    const tiles = plan.tokenRuns.flatMap((run, tokensOf) => {
      const slice = sliceOf(tensor, exchange.layout, `${run.first}:${run.end}`, ":");
      return placed(exchange, { tensor, tokensOf, headsOf: rank }, tokens[tokensOf], heads[0], slice);
    });
    return tensorFrame(exchange, tensor, BigInt(plan.tokens), BigInt(held), tiles);
  }
  function tensorFrame(exchange, tensor, tokens, heads, tiles) {
    const shape = shapeOf(exchange.layout, exchange.sizes, tokens, heads);
    return { kind: "tensor", name: tensor, shape, weight: Number(heads), tiles };
  }
  function placed(exchange, block, tokens, heads, slice) {
    if (elementsOf(exchange, block) === 0n) return [];
    const { layout, sizes } = exchange;
    const [down, across] = layout === "b h s d" ? [heads, tokens] : [tokens, heads];
    const rows = layout.startsWith("s") ? 1 : Number(sizes.batch < SHOWN_ROWS ? sizes.batch : SHOWN_ROWS);
    return Array.from({ length: rows }, (_, row) => {
      const at = {
        left: across[0],
        width: across[1] - across[0],
        top: (row + down[0]) / rows,
        height: (down[1] - down[0]) / rows
      };
      return { ...block, at, slice };
    });
  }
  function buffers(exchange, route, cut, verb, rank) {
    const byHeads = cut === route.byHeads;
    const blockOf = (tensor, other) => byHeads ? { tensor, tokensOf: rank, headsOf: other } : { tensor, tokensOf: other, headsOf: rank };
    const spans = spread(cut.pieces.map((piece) => Number(piece.end - piece.begin)));
    const tiles = cut.pieces.flatMap((piece, i) => {
      if (piece.begin === piece.end) return [];
      const at = { left: spans[i][0], width: spans[i][1] - spans[i][0], top: 0, height: 1 };
      return [
        { ...blockOf(piece.tensor, piece.rank), at, slice: `${verb} buffer[${piece.begin}:${piece.end}]` }
      ];
    });
    const names = cut.tensors.length > 1 ? "query, key, value" : cut.tensors[0];
    const buffer = {
      kind: "buffer",
      name: `${verb} buffer: ${names}`,
      shape: `(${cut.elements},)`,
      weight: 1,
      tiles
    };
    return cut.kept ? [
      buffer,
      keptFrame(
        exchange,
        cut.tensors.map((tensor) => blockOf(tensor, rank)),
        names
      )
    ] : [buffer];
  }
  function keptFrame(exchange, blocks, names) {
    const spans = spread(blocks.map((block) => Number(elementsOf(exchange, block))));
    const tiles = blocks.flatMap((block, i) => {
      if (elementsOf(exchange, block) === 0n) return [];
      const at = { left: spans[i][0], width: spans[i][1] - spans[i][0], top: 0, height: 1 };
      return [{ ...block, at, slice: "in no buffer: copied from tensor to tensor" }];
    });
    return { kind: "kept", name: `stays here: ${names}`, shape: "", weight: 1, tiles };
  }
  function sliceOf(tensor, layout, tokens, heads) {
    const index = { b: ":", s: tokens, h: heads, d: ":" };
    return `${tensor}[${layout.split(" ").map((word) => index[word]).join(", ")}]`;
  }
  function spread(lengths) {
    const total = lengths.reduce((sum2, length) => sum2 + length, 0);
    const thinnest = 0.4 / Math.max(1, lengths.filter((length) => length > 0).length);
    const widths = lengths.map((length) => length > 0 ? Math.max(length / total, thinnest) : 0);
    const width = widths.reduce((sum2, width2) => sum2 + width2, 0) || 1;
    let end = 0;
    return widths.map((own) => [end / width, (end += own) / width]);
  }
  function stripesOf(runs) {
    const edge = (head, rank, right) => {
      const holders = runs.flatMap((run, holder) => run.first <= head && head < run.end ? [holder] : []);
      return head + (holders.indexOf(rank) + right) / holders.length;
    };
    return runs.map(
      (run, rank) => count(run) === 0 ? [0, 0] : [edge(run.first, rank, 0), edge(run.end - 1, rank, 1)]
    );
  }

  // words.ts
  var LINES = from_python_default.lines;
  var SENTENCES = {
    shards: "Each rank holds all heads of its own tokens: A[B, S_P, H, D].",
    pack: "Each rank writes one chunk for each rank into a flat buffer: the heads that the other one owns, of its own tokens.",
    "in flight": "One all-to-all carries every block from the rank that owns its tokens to the rank that owns its heads.",
    arrived: "The blocks stand in the receive buffer in the order of the ranks that sent them, which is the order of the tokens.",
    unpack: "Each rank puts the blocks together: all tokens of its own heads, A[B, S, H_P, D].",
    attention: "Each rank attends over all tokens with its own heads. Here the ranks do not communicate.",
    "pack output": "The way back. The chunk for a rank is the output for that rank's tokens.",
    "output in flight": "The second all-to-all carries every block of the output to the rank that owns its tokens.",
    "output arrived": "The blocks stand in the receive buffer in the order of the ranks, which is the order of the heads.",
    "unpack output": "Each rank holds the output for its own tokens, all heads: the shape that its query had."
  };
  var isBack = (step) => STEPS.indexOf(step) > STEPS.indexOf("attention");
  function codeOf(exchange, step) {
    const ranks = exchange.plan.tokenRuns.map((_, rank) => rank);
    const everywhere = (key) => ({ ...LINES[key], ranks: "" });
    const where = (key, holds) => {
      const those = ranks.filter(holds);
      const said = those.length === ranks.length ? "" : `on ${ranksInWords(those)}`;
      return those.length > 0 ? [{ ...LINES[key], ranks: said }] : [];
    };
    const ways = (verb) => ["in order", "strided", "ragged"].flatMap(
      (way) => where(`${verb} ${way}`, (rank) => cutsOf(exchange, step, rank).some((cut) => cut.way === way))
    );
    const keeps = (rank) => (isBack(step) ? [exchange.back[rank]] : exchange.there[rank]).some((route) => route.byHeads.kept);
    const hasHeads = (rank) => count(exchange.plan.headRuns.query[rank]) > 0;
    switch (step) {
      case "shards":
        return [everywhere("shards")];
      case "pack":
        return ways("pack");
      case "pack output":
        return [everywhere("back"), ...ways("pack")];
      case "in flight":
      case "output in flight":
        return [everywhere("in flight"), ...where("kept", keeps)];
      case "arrived":
      case "output arrived":
        return [everywhere("arrived")];
      case "attention":
        return [
          everywhere("attention"),
          everywhere("uses"),
          ...where("expand", (rank) => usesOf(exchange, rank).expand),
          ...where("no heads", (rank) => !hasHeads(rank))
        ];
      default:
        return ways("unpack");
    }
  }
  function factsOf(exchange, step, block, rank, slice) {
    const { plan, sizes } = exchange;
    const runs = runsOfTensor(plan, block.tensor);
    const kind = block.tensor === "query" || block.tensor === "output" ? "query heads" : "kv heads";
    const tokens = `tokens ${describe(plan.tokenRuns[block.tokensOf])}`;
    const heads = `${kind} ${describe(runs[block.headsOf])}`;
    const others = sharing(runs, block.headsOf);
    const copies = others.length > 0 ? `; ${ranksInWords(others)} get${others.length > 1 ? "" : "s"} copies of them` : "";
    const bytes = elementsOf(exchange, block) * sizes.itemSize;
    const [from, to] = endsOf(step, block);
    const sent = from === to ? `stays on rank ${from}, none are sent` : `sent from rank ${from} to rank ${to}`;
    return [
      { name: "block", text: `${block.tensor}, ${tokens}, ${heads}` },
      {
        name: "owner",
        text: `rank ${block.tokensOf} of the tokens, rank ${block.headsOf} of the heads${copies}`
      },
      { name: "slice", text: rank === null ? slice : `${slice} on rank ${rank}` },
      { name: "bytes", text: `${grouped(bytes)} bytes, ${sent}` }
    ];
  }
  function endsOf(step, { tensor, tokensOf, headsOf }) {
    return tensor === "output" || isBack(step) ? [headsOf, tokensOf] : [tokensOf, headsOf];
  }
  function labelOf(step, block) {
    const [from, to] = endsOf(step, block);
    return from === to ? String(from) : `${from}→${to}`;
  }
  var grouped = (number) => number.toLocaleString("en");
  function ranksInWords(ranks) {
    if (ranks.length === 1) return `rank ${ranks[0]}`;
    const [first, last] = [ranks[0], ranks[ranks.length - 1]];
    if (ranks.length > 2 && last - first === ranks.length - 1) return `ranks ${first}-${last}`;
    return `ranks ${ranks.slice(0, -1).join(", ")} and ${last}`;
  }
  function methodOf({ plan }) {
    const query = plan.headRuns.query.map(count);
    const even = new Set(query).size === 1 ? "even" : "uneven";
    const copies = plan.headRuns.kv.map(count).reduce((total, own) => total + own, 0) - plan.kvHeads;
    const replicated = copies > 0 ? `kv heads replicated (${copies} cop${copies > 1 ? "ies" : "y"} more)` : "no kv head replicated";
    return `${even}: query heads ${query.join(", ")}; ${replicated}`;
  }
  function sharing(runs, rank) {
    const own = runs[rank];
    return runs.flatMap(
      (run, other) => other !== rank && run.first < own.end && own.first < run.end ? [other] : []
    );
  }

  // tiles.ts
  var COLOURS = from_python_default.colours;
  function make(name, attributes, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }
  function drawStep(exchange, step) {
    if (step === "in flight" || step === "output in flight") return drawFlight(exchange, step);
    const most = Math.max(1, ...exchange.plan.tokenRuns.map(count));
    const cards = exchange.plan.tokenRuns.map((tokens, rank) => {
      const tall = step === "shards" || step === "unpack output" ? count(tokens) / most : 1;
      const frames = framesOf(exchange, step, rank).map(
        (frame) => drawFrame(exchange, step, rank, frame, tall)
      );
      const notes = step === "attention" ? [drawUses(exchange, rank)] : [];
      return drawCard(exchange, rank, make("div", { class: "frames" }, ...frames), ...notes);
    });
    return make(
      "div",
      {},
      make("p", { class: "axes" }, axesOf(exchange, step)),
      make("div", { class: "cards" }, ...cards)
    );
  }
  function axesOf({ layout, sizes }, step) {
    if (step.includes("pack") !== step.includes("unpack") || step.includes("arrived")) {
      return "A buffer, from its first element to its last; a gap parts what belongs to different ranks.";
    }
    const axes = {
      "b s h d": "tokens go down, heads go across",
      "s b h d": "tokens go down (each with all rows of the batch), heads go across",
      "b h s d": "heads go down, tokens go across"
    }[layout];
    const rows = layout.startsWith("s") || sizes.batch < 2n ? "" : ", one row of the batch below the other";
    const more = rows && sizes.batch > SHOWN_ROWS ? ` (${SHOWN_ROWS} of ${sizes.batch})` : "";
    return `A tensor as it lies in memory: ${axes}${rows}${more}.`;
  }
  function drawCard({ plan }, rank, ...content) {
    const owned = `tokens ${describe(plan.tokenRuns[rank])} · query heads ${describe(plan.headRuns.query[rank])} · kv heads ${describe(plan.headRuns.kv[rank])}`;
    const title = make("h4", {}, drawSwatch(plan.ranks, rank), ` rank ${rank} `, make("small", {}, owned));
    return make("section", { class: "card", "data-rank": String(rank) }, title, ...content);
  }
  function drawFrame(exchange, step, rank, frame, tall) {
    const head = make("figcaption", {}, make("b", {}, frame.name), ` ${frame.shape} `);
    const rows = /* @__PURE__ */ new Map();
    const chunkOf = (block) => block.tokensOf === rank ? block.headsOf : block.tokensOf;
    const tiles = frame.tiles.map((tile, i) => {
      const row = rows.get(keyOf(tile)) ?? 0;
      rows.set(keyOf(tile), row + 1);
      const button = drawTile(exchange, step, tile, factsOf(exchange, step, tile, rank, tile.slice), row);
      if (frame.kind === "buffer" && i > 0 && chunkOf(tile) !== chunkOf(frame.tiles[i - 1]))
        button.classList.add("first");
      for (const [side, part] of Object.entries(tile.at)) button.style.setProperty(side, `${100 * part}%`);
      return button;
    });
    const area = make("div", { class: "area" }, ...tiles.length > 0 ? tiles : [make("i", {}, "empty")]);
    area.style.setProperty("--tall", String(tall));
    area.style.setProperty("--bands", String(new Set(frame.tiles.map((tile) => tile.at.top)).size));
    const figure = make("figure", { class: frame.kind }, head, area);
    figure.style.flexGrow = String(Math.max(1, frame.weight));
    return figure;
  }
  function drawFlight(exchange, step) {
    const ranks = exchange.plan.tokenRuns.map((_, rank) => rank);
    const head = (rank, scope) => make("th", { scope }, drawSwatch(ranks.length, rank), ` ${scope === "row" ? "from" : "to"} ${rank}`);
    const rows = ranks.map((sender) => {
      const cells = ranks.map((receiver) => drawCell(exchange, step, sender, receiver));
      return make("tr", {}, head(sender, "row"), ...cells);
    });
    const top = make("tr", {}, make("td", {}), ...ranks.map((rank) => head(rank, "col")));
    return make("div", { class: "scrolls" }, make("table", { class: "flight" }, top, ...rows));
  }
  function drawCell(exchange, step, sender, receiver) {
    const blocks = flightOf(exchange, step, sender, receiver);
    const spans = spread(blocks.map((block) => Number(elementsOf(exchange, block))));
    const place = sender === receiver ? "in no message" : `in the message from rank ${sender} to rank ${receiver}`;
    const tiles = blocks.map((block, i) => {
      const button = drawTile(exchange, step, block, factsOf(exchange, step, block, null, place), 0);
      button.style.left = `${100 * spans[i][0]}%`;
      button.style.width = `${100 * (spans[i][1] - spans[i][0])}%`;
      return button;
    });
    const elements = blocks.reduce((total, block) => total + elementsOf(exchange, block), 0n);
    const sent = sender === receiver ? "stays" : `${grouped(elements * exchange.sizes.itemSize)} B`;
    return make(
      "td",
      sender === receiver ? { class: "stays" } : {},
      make("div", { class: "area" }, ...tiles),
      sent
    );
  }
  function drawTile(exchange, step, block, facts, row) {
    const colours = COLOURS[exchange.plan.ranks];
    const tile = make(
      "button",
      {
        class: "tile",
        type: "button",
        tabindex: "-1",
        "data-block": keyOf(block),
        "data-row": String(row),
        "data-facts": JSON.stringify(facts),
        "aria-label": facts.map(({ name, text }) => `${name}: ${text}`).join(". ")
      },
      make("span", {}, make("span", {}, `${block.tensor[0]} `), labelOf(step, block))
    );
    const [fill, ink] = colours[block.tokensOf];
    tile.style.setProperty("--fill", fill);
    tile.style.setProperty("--ink", ink);
    tile.style.setProperty("--band", colours[block.headsOf][0]);
    const [from, to] = endsOf(step, block);
    if (from === to) tile.classList.add("own");
    return tile;
  }
  function drawSwatch(ranks, rank) {
    const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.background = COLOURS[ranks][rank][0];
    return swatch;
  }
  function drawUses(exchange, rank) {
    const { uses, expand } = usesOf(exchange, rank);
    if (uses.length === 0) return make("p", { class: "uses" }, "No heads: the local attention is not called.");
    const said = uses.map(
      ([run, head]) => `query head${count(run) > 1 ? "s" : ""} ${describe(run)} with kv head ${head}`
    );
    const more = count(exchange.plan.headRuns.kv[rank]) > uses.length ? ", ..." : "";
    const copied = expand ? " These shares differ, so each query head gets a copy of its kv head." : "";
    return make("p", { class: "uses" }, `${said.join(", ")}${more}.${copied}`);
  }
  var keyOf = (block) => `${block.tensor} ${block.tokensOf} ${block.headsOf}`;

  // controls.ts
  var METHODS = {
    auto: "auto",
    balanced: "balanced: as even as can be",
    groups: "groups: whole kv groups"
  };
  var named = (names) => Object.fromEntries(names.map((name) => [name, name]));
  var FIELDS = {
    ranks: { label: "ranks", hint: "ranks in the group" },
    tokens: { label: "tokens", hint: "the total, or one number for each rank: 3, 3, 2, 2" },
    heads: { label: "query heads", hint: "query heads in all" },
    kv_heads: { label: "kv heads", hint: "kv heads in all; as many as query heads if empty" },
    policy: { label: "method", hint: "how query heads are divided: policy of make_plan", choices: METHODS },
    layout: {
      label: "layout",
      hint: "order of the dims: batch, sequence, heads, dim",
      choices: named(LAYOUTS)
    },
    batch: { label: "batch", hint: "rows of the batch" },
    head_dim: { label: "head dim", hint: "elements of one vector" },
    dtype: { label: "dtype", hint: "what travels", choices: named(Object.keys(ITEM_SIZES)) }
  };
  var Controls = class {
    form;
    presets;
    inputs = {};
    constructor(changed) {
      const labels = Object.keys(FIELDS).map((field) => {
        const input = this.inputs[field] = makeInput(field);
        input.addEventListener("input", () => changed({ [field]: input.value }));
        return make("label", { title: FIELDS[field].hint }, FIELDS[field].label, input);
      });
      this.form = make("form", { class: "controls", "aria-label": "setting" }, ...labels);
      this.form.addEventListener("submit", (event) => event.preventDefault());
      const buttons = Object.entries(PRESETS).map(([name, preset]) => {
        const button = make("button", { type: "button", class: "preset" }, name);
        button.addEventListener("click", () => changed(preset));
        return button;
      });
      this.presets = make("p", { class: "presets" }, "Begin with: ", ...buttons);
    }
    show(setting) {
      for (const [field, input] of Object.entries(this.inputs)) {
        if (input.value !== setting[field]) input.value = setting[field];
      }
    }
  };
  function makeInput(field) {
    const { choices } = FIELDS[field];
    const common = { name: field, value: DEFAULTS[field] };
    if (choices) {
      const options = Object.entries(choices).map(([value, text]) => make("option", { value }, text));
      return make("select", common, ...options);
    }
    const kind = field === "tokens" ? { type: "text" } : { type: "number", min: "0", step: "1" };
    return make("input", { ...common, ...kind, autocomplete: "off" });
  }

  // motion.ts
  var MILLISECONDS = 550;
  var keyOf2 = (tile) => `${tile.dataset.block}/${tile.dataset.row}`;
  function placesOf(tiles) {
    return new Map([...tiles].map((tile) => [keyOf2(tile), tile.getBoundingClientRect()]));
  }
  function moveFrom(before, tiles) {
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    for (const tile of tiles) {
      const old = before.get(keyOf2(tile)) ?? before.get(`${tile.dataset.block}/0`);
      const now = tile.getBoundingClientRect();
      if (!old || now.width === 0 || now.height === 0) continue;
      const shift = `translate(${old.left - now.left}px, ${old.top - now.top}px)`;
      const scale = `scale(${old.width / now.width}, ${old.height / now.height})`;
      tile.animate(
        [
          { transform: `${shift} ${scale}`, zIndex: 2 },
          { transform: "none", zIndex: 2 }
        ],
        {
          duration: MILLISECONDS,
          easing: "ease-in-out"
        }
      );
    }
  }
  function neighbour(tiles, from, key) {
    const here = middleOf(from);
    const ahead = tiles.filter((tile) => tile !== from).map((tile) => ({ tile, ...offset(here, middleOf(tile), key) }));
    return ahead.filter(({ along }) => along > 1).sort((a, b) => a.along + 3 * a.aside - b.along - 3 * b.aside)[0]?.tile;
  }
  function middleOf(tile) {
    const { left, top, width, height } = tile.getBoundingClientRect();
    return { x: left + width / 2, y: top + height / 2 };
  }
  function offset(here, there, key) {
    const [right, down] = [there.x - here.x, there.y - here.y];
    if (key === "ArrowLeft") return { along: -right, aside: Math.abs(down) };
    if (key === "ArrowRight") return { along: right, aside: Math.abs(down) };
    if (key === "ArrowUp") return { along: -down, aside: Math.abs(right) };
    return { along: down, aside: Math.abs(right) };
  }

  // style.css
  var style_default = ':host {\n  --paper: var(--md-default-bg-color, #fff);\n  --ink-page: var(--md-typeset-color, #222);\n  --quiet: var(--md-default-fg-color--light, #666);\n  --line: var(--md-default-fg-color--lighter, #ccc);\n  --raised: var(--md-code-bg-color, #f5f5f5);\n  --chosen: var(--md-typeset-a-color, #3949ab);\n  display: block;\n  color: var(--ink-page);\n  font-size: 0.7rem;\n  line-height: 1.4;\n}\n* { box-sizing: border-box; }\n[hidden] { display: none !important; }\nh3 { margin: 0.8rem 0 0.2rem; font-size: 0.9rem; }\nh4 { margin: 0 0 0.3rem; font-size: 0.75rem; }\np { margin: 0.3rem 0; }\nsmall, .axes, figcaption, .uses, caption { color: var(--quiet); font-weight: normal; font-size: 0.6rem; }\npre, code { font-family: var(--md-code-font-family, ui-monospace, monospace); font-size: 0.62rem; }\npre { margin: 0; padding: 0.4rem 0.6rem; overflow-x: auto; background: var(--raised); border-radius: 0.1rem; }\nfigure { margin: 0; min-width: 0; }\nbutton, input, select {\n  font: inherit;\n  color: inherit;\n  background: var(--paper);\n  border: 1px solid var(--quiet);\n  border-radius: 0.15rem;\n  padding: 0.2rem 0.4rem;\n}\nbutton { cursor: pointer; }\nbutton:disabled { opacity: 0.4; cursor: default; }\n:focus-visible { outline: 3px solid var(--chosen); outline-offset: 1px; }\n\n.controls { display: grid; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); gap: 0.4rem 0.6rem; }\n.controls label { display: grid; gap: 0.1rem; font-size: 0.62rem; color: var(--quiet); }\n.controls input, .controls select { width: 100%; min-width: 0; font-size: 0.7rem; color: var(--ink-page); }\n.presets button { margin: 0.1rem 0.2rem 0.1rem 0; font-size: 0.62rem; }\n.error { border-left: 0.2rem solid #d55e00; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.7rem; }\n\n.stepper { display: flex; gap: 0.4rem; align-items: start; margin-top: 0.6rem; }\n.stepper [role="tablist"] { display: flex; flex-wrap: wrap; gap: 0.2rem; flex: 1; }\n.stepper [role="tab"] { font-size: 0.62rem; }\n.stepper [aria-selected="true"] { background: var(--chosen); border-color: var(--chosen); color: var(--paper); }\n.turn { font-weight: bold; }\n@media (max-width: 40rem) { .stepper [role="tab"] span { display: none; } }\n\n.code { display: grid; gap: 0.3rem; margin: 0.4rem 0; }\n.code figcaption code { color: var(--ink-page); }\n.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 0.5rem; }\n.card { border: 1px solid var(--line); border-radius: 0.2rem; padding: 0.4rem; min-width: 0; }\n.frames { display: flex; flex-wrap: wrap; gap: 0.4rem 0.5rem; align-items: end; }\n.tensor { flex: 1 1 3.6rem; }\n.buffer { flex: 1 1 100%; }\n.kept { flex: 1 1 100%; }\n.kept .area { border-style: dashed; max-width: 50%; }\n.area {\n  position: relative;\n  height: max(calc(1.6rem + 4.4rem * var(--tall, 1)), min(20rem, 0.85rem * var(--bands, 1)));\n  border: 1px solid var(--line);\n  min-width: 2.4rem;\n}\n.buffer .area, .kept .area, .flight .area { height: 1.9rem; }\n.area i { padding: 0 0.3rem; color: var(--quiet); font-size: 0.6rem; }\n.swatch { display: inline-block; width: 0.7em; height: 0.7em; border: 1px solid var(--quiet); }\n\n.tile {\n  position: absolute;\n  top: 0;\n  height: 100%;\n  margin: 0;\n  padding: 0 0 0 6px;\n  overflow: hidden;\n  container-type: size;\n  color: var(--ink);\n  background: linear-gradient(to right, var(--band) 6px, var(--paper) 6px 7px, var(--fill) 7px);\n  border: 1px solid var(--paper);\n  border-radius: 0;\n  transform-origin: 0 0;\n  font-size: 0.58rem;\n  line-height: 1;\n  white-space: nowrap;\n}\n.tile.first { border-left: 4px solid var(--paper); }\n.tile.same { outline: 2px solid var(--ink-page); outline-offset: -1px; z-index: 1; }\n.tile:focus-visible { outline: 3px solid var(--chosen); outline-offset: 0; z-index: 1; }\n@container (max-width: 2rem) { .tile span span { display: none; } }\n@container (max-width: 1.1rem) or (max-height: 0.5rem) { .tile span { visibility: hidden; } }\n\n.scrolls { overflow-x: auto; }\ntable { border-collapse: collapse; font-size: 0.62rem; }\nth, td { padding: 0.15rem 0.3rem; text-align: right; white-space: nowrap; font-weight: normal; }\n.flight { width: 100%; }\n.flight th, .flight td { text-align: center; }\n.flight td { min-width: 4.2rem; color: var(--quiet); }\n.flight .stays .area { border-style: dashed; }\n.bytes td, .bytes th { border: 1px solid var(--line); font-variant-numeric: tabular-nums; }\ncaption { text-align: left; padding: 0.3rem 0; white-space: nowrap; }\n\n.facts {\n  position: sticky;\n  bottom: 0;\n  z-index: 3;\n  min-height: 3.4rem;\n  margin: 0.5rem 0;\n  padding: 0.3rem 0.6rem;\n  background: var(--raised);\n  border-top: 2px solid var(--chosen);\n  overflow-wrap: anywhere;\n}\n.facts div { padding-left: 2.8rem; text-indent: -2.8rem; }\n.facts b { display: inline-block; width: 2.6rem; text-indent: 0; }\n.numbers { margin-top: 0.4rem; }\nsummary { cursor: pointer; }\n';

  // element.ts
  var HINT = "Point at a block, or move there with Tab and the arrow keys: its owner, its slice and its bytes.";
  var Base = globalThis.HTMLElement ?? class {
  };
  var Explorer = class extends Base {
    setting = fromHash("");
    controls = new Controls((part) => this.change(part));
    message = make("div", { class: "message", "aria-live": "polite" });
    stepper = make("div", { class: "stepper" });
    stage = make("section", { class: "stage", id: "stage", "aria-label": "step" });
    facts = make("div", { class: "facts" });
    numbers = make("details", { class: "numbers", open: "" });
    connectedCallback() {
      const root = this.shadowRoot ?? this.attachShadow({ mode: "open" });
      const sheet = make("style", {}, style_default);
      root.replaceChildren(
        sheet,
        this.controls.form,
        this.controls.presets,
        this.message,
        this.stepper,
        this.stage,
        this.facts,
        this.numbers
      );
      this.makeStepper();
      for (const name of ["pointerover", "focusin"])
        this.stage.addEventListener(name, (event) => this.pointAt(event));
      this.stage.addEventListener("keydown", (event) => this.moveAmongTiles(event));
      addEventListener("hashchange", this.readHash);
      this.readHash();
    }
    disconnectedCallback() {
      removeEventListener("hashchange", this.readHash);
    }
    readHash = () => {
      if (location.hash && !location.hash.includes("=")) return;
      this.setting = fromHash(location.hash);
      this.show();
    };
    change(part) {
      const moves = Object.keys(part).join() === "step";
      const before = moves ? placesOf(this.tiles()) : null;
      this.setting = { ...this.setting, ...part };
      history.replaceState(history.state, "", toHash(this.setting));
      this.show();
      if (before) moveFrom(before, this.tiles());
    }
    get step() {
      return STEPS.find((step) => step === this.setting.step) ?? STEPS[0];
    }
    show() {
      this.controls.show(this.setting);
      this.facts.replaceChildren(HINT);
      try {
        this.showWorld(worldOf(this.setting));
      } catch (error) {
        if (!(error instanceof SeqparError)) throw error;
        this.message.replaceChildren(
          make("pre", { class: "error", role: "alert" }, `${error.kind}: ${error.message}`)
        );
        for (const part of [this.stepper, this.stage, this.facts, this.numbers]) part.hidden = true;
      }
    }
    showWorld(world) {
      const { exchange } = world;
      for (const part of [this.stepper, this.stage, this.facts]) part.hidden = exchange === null;
      this.numbers.hidden = false;
      this.numbers.replaceChildren(...drawNumbers(world));
      if (exchange === null) {
        const said = `Pictures are drawn for up to ${DRAWN_RANKS} ranks. The plan of ${world.plan.ranks} is below.`;
        this.message.replaceChildren(make("p", {}, said));
        return;
      }
      this.message.replaceChildren(make("p", {}, methodOf(exchange)));
      this.markStep();
      const title = make("h3", {}, `${STEPS.indexOf(this.step) + 1}. ${this.step}`);
      const code = make("div", { class: "code" }, ...codeOf(exchange, this.step).map(drawCode));
      this.stage.replaceChildren(
        title,
        make("p", {}, ...withSubscripts(SENTENCES[this.step])),
        code,
        drawStep(exchange, this.step)
      );
      this.tiles()[0]?.setAttribute("tabindex", "0");
    }
    makeStepper() {
      const step = (by) => this.change({ step: STEPS[STEPS.indexOf(this.step) + by] });
      const [back, next] = ["Back", "Next"].map(
        (name) => make("button", { type: "button", class: "turn" }, name)
      );
      back.addEventListener("click", () => step(-1));
      next.addEventListener("click", () => step(1));
      const tabs = make(
        "div",
        { role: "tablist", "aria-label": "steps" },
        ...STEPS.map((name, i) => {
          const called = {
            role: "tab",
            type: "button",
            "aria-controls": "stage",
            "aria-label": `${i + 1} ${name}`
          };
          const tab = make("button", called, String(i + 1), make("span", {}, ` ${name}`));
          tab.addEventListener("click", () => this.change({ step: name }));
          return tab;
        })
      );
      tabs.addEventListener("keydown", (event) => this.turnByKey(event));
      this.stepper.replaceChildren(back, tabs, next);
    }
    markStep() {
      const [back, tabs, next] = this.stepper.children;
      const current = STEPS.indexOf(this.step);
      back.disabled = current === 0;
      next.disabled = current === STEPS.length - 1;
      [...tabs.children].forEach((tab, i) => {
        tab.setAttribute("aria-selected", String(i === current));
        tab.setAttribute("tabindex", i === current ? "0" : "-1");
      });
    }
    turnByKey(event) {
      const current = STEPS.indexOf(this.step);
      const last = STEPS.length - 1;
      const targets = {
        ArrowLeft: current - 1,
        ArrowRight: current + 1,
        Home: 0,
        End: last
      };
      const target = targets[event.key];
      if (target === void 0) return;
      event.preventDefault();
      const step = Math.min(last, Math.max(0, target));
      if (step !== current) this.change({ step: STEPS[step] });
      this.stepper.children[1].children[step].focus();
    }
    tiles() {
      return [...this.stage.querySelectorAll(".tile")];
    }
    /** Say what the block is, and mark it where it has several pieces. */
    pointAt(event) {
      const tile = event.target.closest(".tile");
      if (!tile) return;
      for (const other of this.tiles()) {
        other.classList.toggle("same", other.dataset.block === tile.dataset.block);
        if (event.type === "focusin") other.setAttribute("tabindex", other === tile ? "0" : "-1");
      }
      const facts = JSON.parse(tile.dataset.facts);
      this.facts.replaceChildren(
        ...facts.map(({ name, text }) => make("div", {}, make("b", {}, name), ` ${text}`))
      );
    }
    moveAmongTiles(event) {
      const tile = event.target.closest(".tile");
      if (!tile || !event.key.startsWith("Arrow")) return;
      event.preventDefault();
      neighbour(this.tiles(), tile, event.key)?.focus();
    }
  };
  function withSubscripts(text) {
    return text.split(/_(P)/).map((part, i) => i % 2 === 1 ? make("sub", {}, part) : part);
  }
  function drawCode({ file, function: name, lines, ranks }) {
    const caption = make("figcaption", {}, make("code", {}, file), ` ${name} ${ranks}`);
    return make("figure", {}, caption, make("pre", {}, make("code", {}, lines.join("\n"))));
  }
  function drawNumbers({ plan, sizes, exchange }) {
    const summary = make("summary", {}, "The plan, and the bytes of a forward pass");
    const printed = make("pre", { class: "plan" }, table(plan));
    if (exchange === null) return [summary, printed];
    const matrix = bytesOf(plan, sizes.batch, sizes.headDim, sizes.itemSize);
    return [summary, printed, make("div", { class: "scrolls" }, drawMatrix(plan, matrix, exchange))];
  }
  function drawMatrix(plan, matrix, { wire }) {
    const add = (row2) => row2.reduce((total, entry) => total + entry, 0n);
    const cell = (name, text) => make(name, {}, typeof text === "string" ? text : grouped(text));
    const row = (head, entries) => make("tr", {}, cell("th", head), ...entries.map((entry) => cell("td", entry)), cell("td", add(entries)));
    const heads = plan.tokenRuns.map((_, rank) => cell("th", `to ${rank}`));
    const columns = matrix.map((_, receiver) => add(matrix.map((sent) => sent[receiver])));
    const collectives = wire === "fused" ? "q, k and v in one all-to-all" : "q, k and v in three all-to-alls";
    return make(
      "table",
      { class: "bytes" },
      make("caption", {}, `Bytes: ${collectives}, and one for the output`),
      make("tr", {}, cell("th", ""), ...heads, cell("th", "sent")),
      ...matrix.map((entries, sender) => row(`from ${sender}`, entries)),
      row("received", columns)
    );
  }

  // main.ts
  function answer(setting) {
    try {
      const { plan, sizes, exchange } = worldOf({ ...fromHash(""), ...setting });
      const matrices = ["query", "kv", "kv once"].map((heads) => [heads, vectors(plan, heads)]);
      const bytes = bytesOf(plan, sizes.batch, sizes.headDim, sizes.itemSize);
      return {
        plan: { ...plan, table: table(plan) },
        vectors: Object.fromEntries(matrices),
        bytes: bytes.map((row) => row.map(String)),
        wire: exchange?.wire ?? null
      };
    } catch (error) {
      if (!(error instanceof SeqparError)) throw error;
      return { error: `${error.kind}: ${error.message}` };
    }
  }
  function shown(setting) {
    const { exchange } = worldOf({ ...fromHash(""), ...setting });
    if (exchange === null) return {};
    const ranks = exchange.plan.tokenRuns.map((_, rank) => rank);
    const steps = STEPS.map((step) => {
      const frames = ranks.map((rank) => framesOf(exchange, step, rank));
      const blocks = ranks.map((sender) => ranks.map((receiver) => flightOf(exchange, step, sender, receiver)));
      return [step, { frames, blocks: step.endsWith("in flight") ? blocks : [], code: codeOf(exchange, step) }];
    });
    return Object.fromEntries(steps);
  }
  globalThis.customElements?.define("seqpar-explorer", Explorer);
  return __toCommonJS(main_exports);
})();
