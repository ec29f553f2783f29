// Who owns which tokens, which query heads and which kv heads: the arithmetic of seqpar_ref/plan.py, with its
// errors. Tests compare both over drawn settings.

import fromPython from "./from_python.json";
import { kindOf, repr, type Value } from "./values.js";

export class SeqparError extends Error {
  /** As in Python, str(error) is two lines: what is wrong, and what to change. */
  constructor(
    readonly kind: string,
    wrong: string,
    change: string,
  ) {
    super(`${wrong}\n  ${change}`);
  }
}

export interface Run {
  first: number;
  end: number;
}

export type Heads = "query" | "kv" | "kv once";

export interface Plan {
  ranks: number;
  tokens: number;
  heads: number;
  kvHeads: number;
  tokenRuns: Run[];
  headRuns: Record<Heads, Run[]>;
}

export interface Request {
  ranks: Value;
  heads: Value;
  kv_heads: Value;
  tokens: Value;
  policy: string;
}

const MOST_RANKS = BigInt(fromPython.bounds.mostRanks);
const POLICIES = ["auto", "balanced", "groups"];
export const ITEM_SIZES: Record<string, bigint> = { float64: 8n, float32: 4n, bfloat16: 2n, float16: 2n };

export const count = (run: Run): number => run.end - run.first;
export const sum = (numbers: number[]): number => numbers.reduce((total, number) => total + number, 0);

export function makePlan(request: Request): Plan {
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
    groups: planOf(tokens, groups, kvHeads),
  };
  if (request.policy !== "auto") return candidates[request.policy as "balanced" | "groups"];
  const [cost, other] = [costOf(candidates.balanced), costOf(candidates.groups)];
  const fewerBytes = other[0] === cost[0] && other[1] < cost[1];
  return other[0] < cost[0] || fewerBytes ? candidates.groups : candidates.balanced;
}

/** Vectors that each rank sends to each other for one row of the batch, by [sender][receiver]. */
export function vectors(plan: Plan, heads: Heads): number[][] {
  return plan.tokenRuns.map((tokens, sender) =>
    plan.headRuns[heads].map((held, receiver) => (sender === receiver ? 0 : count(tokens) * count(held))),
  );
}

/** What the sizes of one attention have to be, before bytes are counted. */
export function checkedSizes(
  plan: Plan,
  batch: Value,
  headDim: Value,
  dtype: string,
): [bigint, bigint, bigint] {
  const [rows, dim] = integers("batch, head_dim, value_dim", [batch, headDim, headDim]);
  const size = Object.hasOwn(ITEM_SIZES, dtype) ? ITEM_SIZES[dtype] : undefined;
  if (size === undefined) {
    throw planError(`dtype is ${repr(dtype)}.`, "Pass a torch.dtype, such as torch.bfloat16.");
  }
  const largest = rows > dim ? rows : dim;
  if (4n * largest * rows * BigInt(plan.tokens) * BigInt(plan.heads) * size >= 2n ** 63n) {
    throw planError(`batch ${rows}, head dim ${dim} are more than can be counted.`, "Use smaller ones.");
  }
  return [rows, dim, size];
}

/** Bytes of a forward pass by [sender][receiver]: q, k and v to the heads, the output back. */
export function bytesOf(plan: Plan, batch: bigint, headDim: bigint, itemSize: bigint): bigint[][] {
  const [query, kv] = [vectors(plan, "query"), vectors(plan, "kv")];
  return query.map((row, sender) =>
    row.map((sent, receiver) => {
      const travelling = sent + 2 * kv[sender][receiver] + query[receiver][sender];
      return batch * itemSize * headDim * BigInt(travelling);
    }),
  );
}

/** What print(plan) shows. */
export function table(plan: Plan): string {
  let shown = plan.tokenRuns.map((_, rank) => rank);
  if (plan.ranks > 16) shown = [...shown.slice(0, 8), ...shown.slice(-4)];
  const rows = [["rank", "tokens", "query heads", "kv heads"]];
  for (const rank of shown) {
    const owned = [plan.tokenRuns[rank], plan.headRuns.query[rank], plan.headRuns.kv[rank]];
    rows.push([String(rank), ...owned.map(describe)]);
  }
  if (plan.ranks > 16) rows.splice(9, 0, ["...", "...", "...", "..."]);
  const widths = [0, 1, 2, 3].map((column) => Math.max(...rows.map((row) => row[column].length)));
  const lines = rows.map((row) => row.map((cell, column) => cell.padStart(widths[column])).join("  "));
  const sizes = `${plan.tokens} tokens, ${plan.heads} query heads, ${plan.kvHeads} kv heads`;
  return [`${plan.ranks} ranks, ${sizes}`, ...lines].join("\n");
}

export function describe(run: Run): string {
  if (count(run) === 0) return "-";
  return count(run) === 1 ? String(run.first) : `${run.first}-${run.end - 1}`;
}

export function planError(wrong: string, change: string): SeqparError {
  return new SeqparError("PlanError", wrong, change);
}

function integers(name: string, values: Value): bigint[] {
  if (!Array.isArray(values)) {
    const shown = repr(values).split(/\s+/).join(" ").trim();
    throw planError(`${name} is ${shown}.`, "Use integers: one, or a list of them.");
  }
  return values.map((value) => {
    if (typeof value !== "bigint") {
      throw planError(
        `${name} holds ${repr(value)}, a ${kindOf(value)}.`,
        "Use integers, not floats or bools.",
      );
    }
    if (value < 0n) throw planError(`${name} holds ${value}.`, "Use integers of at least 0.");
    return value;
  });
}

function checkedKvHeads(heads: bigint, given: Value): bigint {
  const [kvHeads] = integers("kv_heads", [given]);
  if (heads < 1n) throw planError("0 query heads attend to nothing.", "Use at least 1 query head.");
  if (kvHeads < 1n || heads % kvHeads !== 0n) {
    const most = heads < 4096n ? Number(heads) : 4096;
    const legal = Array.from({ length: most }, (_, i) => i + 1).filter((d) => heads % BigInt(d) === 0n);
    throw planError(
      `${kvHeads} kv heads cannot serve ${heads} query heads in equal groups.`,
      `Use a number of kv heads that divides ${heads}: ${legal.join(", ")}.`,
    );
  }
  return kvHeads;
}

function tokensByRank(tokens: Value, ranks: bigint): bigint[] {
  if (typeof tokens === "bigint") return divide(integers("tokens", [tokens])[0], ranks);
  const byRank = integers("tokens", tokens);
  if (BigInt(byRank.length) !== ranks) {
    throw planError(
      `tokens has ${byRank.length} entries for ${ranks} ranks.`,
      `Give one count for each of the ${ranks} ranks, zeros included, or the total.`,
    );
  }
  return byRank;
}

function divide(things: bigint, ranks: bigint): bigint[] {
  const [share, leftOver] = [things / ranks, things % ranks];
  return Array.from({ length: Number(ranks) }, (_, rank) => share + (BigInt(rank) < leftOver ? 1n : 0n));
}

function planOf(tokensByRank: bigint[], headsByRank: bigint[], kvHeads: bigint): Plan {
  const add = (total: bigint, entry: bigint): bigint => total + entry;
  const [tokens, heads] = [tokensByRank.reduce(add, 0n), headsByRank.reduce(add, 0n)];
  if (tokens * heads * BigInt(tokensByRank.length) >= 2n ** 48n) {
    throw planError(
      `${tokens} tokens of ${heads} heads on ${tokensByRank.length} ranks are too many to count.`,
      "Keep tokens times heads times ranks below 2**48.",
    );
  }
  const query = runsOf(headsByRank.map(Number));
  return {
    ranks: tokensByRank.length,
    tokens: Number(tokens),
    heads: Number(heads),
    kvHeads: Number(kvHeads),
    tokenRuns: runsOf(tokensByRank.map(Number)),
    headRuns: { query, ...kvRuns(query, Number(heads / kvHeads)) },
  };
}

function runsOf(counts: number[]): Run[] {
  let end = 0;
  return counts.map((own) => ({ first: end, end: (end += own) }));
}

/** Query head i uses kv head i // ratio. "kv once" are those that no lower rank holds. */
function kvRuns(query: Run[], ratio: number): { kv: Run[]; "kv once": Run[] } {
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

/** What "auto" makes small: query heads on the fullest rank, then what the busiest rank sends. */
function costOf(plan: Plan): [number, number] {
  const [tokens, query, kv] = [plan.tokenRuns, plan.headRuns.query, plan.headRuns.kv].map((r) =>
    r.map(count),
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
