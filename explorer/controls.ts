// The form: one field for each number of the setting, and some settings to begin with.

import { DEFAULTS, PRESETS, type Setting } from "./setting.js";
import { ITEM_SIZES } from "./plan.js";
import { make } from "./tiles.js";
import { LAYOUTS } from "./wire.js";

type Field = Exclude<keyof Setting, "step">;

const METHODS = {
  auto: "auto",
  balanced: "balanced: as even as can be",
  groups: "groups: whole kv groups",
};
const named = (names: string[]): Record<string, string> =>
  Object.fromEntries(names.map((name) => [name, name]));

const FIELDS: Record<Field, { label: string; hint: string; choices?: Record<string, string> }> = {
  ranks: { label: "ranks", hint: "ranks in the group" },
  tokens: { label: "tokens", hint: "the total, or one number for each rank: 3, 3, 2, 2" },
  heads: { label: "query heads", hint: "query heads in all" },
  kv_heads: { label: "kv heads", hint: "kv heads in all; as many as query heads if empty" },
  policy: { label: "method", hint: "how query heads are divided: policy of make_plan", choices: METHODS },
  layout: {
    label: "layout",
    hint: "order of the dims: batch, sequence, heads, dim",
    choices: named(LAYOUTS),
  },
  batch: { label: "batch", hint: "rows of the batch" },
  head_dim: { label: "head dim", hint: "elements of one vector" },
  dtype: { label: "dtype", hint: "what travels", choices: named(Object.keys(ITEM_SIZES)) },
};

export class Controls {
  readonly form: HTMLElement;
  readonly presets: HTMLElement;
  private readonly inputs = {} as Record<Field, HTMLInputElement | HTMLSelectElement>;

  constructor(changed: (part: Partial<Setting>) => void) {
    const labels = (Object.keys(FIELDS) as Field[]).map((field) => {
      const input = (this.inputs[field] = makeInput(field));
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

  show(setting: Setting): void {
    for (const [field, input] of Object.entries(this.inputs) as [Field, HTMLInputElement][]) {
      if (input.value !== setting[field]) input.value = setting[field];
    }
  }
}

function makeInput(field: Field): HTMLInputElement | HTMLSelectElement {
  const { choices } = FIELDS[field];
  const common = { name: field, value: DEFAULTS[field] };
  if (choices) {
    const options = Object.entries(choices).map(([value, text]) => make("option", { value }, text));
    return make("select", common, ...options) as HTMLSelectElement;
  }
  const kind: Record<string, string> =
    field === "tokens" ? { type: "text" } : { type: "number", min: "0", step: "1" };
  return make("input", { ...common, ...kind, autocomplete: "off" }) as HTMLInputElement;
}
