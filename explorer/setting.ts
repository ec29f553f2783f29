// What the reader has chosen, as text, as the address bar holds it; and what follows from it, or the error.

import fromPython from "./from_python.json";
import { checkedSizes, makePlan, SeqparError, type Plan } from "./plan.js";
import { literal, literals, repr } from "./values.js";
import { LAYOUTS, routeOf, wireOf, type Route, type Sizes, type Tensor } from "./wire.js";

export const DEFAULTS = {
  ranks: "4",
  tokens: "10",
  heads: "9",
  kv_heads: "3",
  policy: "balanced",
  layout: "b s h d",
  batch: "1",
  head_dim: "8",
  dtype: "float32",
  step: "shards",
};

export type Setting = typeof DEFAULTS;

export const PRESETS: Record<string, Partial<Setting>> = {
  even: { ranks: "4", tokens: "16", heads: "8", kv_heads: "8", policy: "balanced" },
  uneven: { ranks: "4", tokens: "10", heads: "9", kv_heads: "3", policy: "balanced" },
  replicated: { ranks: "4", tokens: "12", heads: "8", kv_heads: "2", policy: "balanced" },
  "fewer heads than ranks": {
    ranks: "4",
    tokens: "3, 5, 0, 2",
    heads: "3",
    kv_heads: "",
    policy: "balanced",
  },
};

export const DRAWN_RANKS = fromPython.bounds.drawnRanks; // more would be too small to tell apart

export interface Exchange {
  plan: Plan;
  layout: string;
  sizes: Sizes;
  wire: "fused" | "pipelined";
  there: Route[][]; // by rank: one route for q, k and v, or one for each of them
  back: Route[]; // by rank, of the output
}

export interface World extends Omit<Exchange, "wire" | "there" | "back"> {
  exchange: Exchange | null; // null where there are too many ranks to draw
}

/** The plan and the sizes, or the error that Python raises for them. */
export function worldOf(setting: Setting): World {
  const plan = makePlan({
    ranks: literal(setting.ranks),
    heads: literal(setting.heads),
    kv_heads: literal(setting.kv_heads),
    tokens: literals(setting.tokens),
    policy: setting.policy,
  });
  const [batch, headDim, itemSize] = checkedSizes(
    plan,
    literal(setting.batch),
    literal(setting.head_dim),
    setting.dtype,
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

export function exchangeOf(plan: Plan, layout: string, sizes: Sizes): Exchange {
  const wire = wireOf(plan, sizes);
  const together: Tensor[][] =
    wire === "fused" ? [["query", "key", "value"]] : [["query"], ["key"], ["value"]];
  const ranks = plan.tokenRuns.map((_, rank) => rank);
  const there = ranks.map((rank) => together.map((tensors) => routeOf(plan, rank, layout, sizes, tensors)));
  const back = ranks.map((rank) => routeOf(plan, rank, layout, sizes, ["output"]));
  return { plan, layout, sizes, wire, there, back };
}

/** A shape as Python prints it. */
export function shapeOf(layout: string, { batch, headDim }: Sizes, tokens: bigint, heads: bigint): string {
  const length: Record<string, bigint> = { b: batch, s: tokens, h: heads, d: headDim };
  return `(${layout
    .split(" ")
    .map((word) => length[word])
    .join(", ")})`;
}

function checkLayout(layout: string): void {
  if (LAYOUTS.includes(layout)) return;
  const known = LAYOUTS.map(repr).join(", ");
  throw new SeqparError("LayoutError", `${repr(layout)} is no layout.`, `Use one of ${known}.`);
}

export function fromHash(hash: string): Setting {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const known = Object.entries(DEFAULTS).map(([name, value]) => [name, given.get(name) ?? value]);
  return Object.fromEntries(known) as Setting;
}

export function toHash(setting: Setting): string {
  return `#${new URLSearchParams(setting)}`;
}
