// Text as Python reads it: an integer, a float, nothing at all, or a string; and how Python prints it.

export type Value = bigint | number | string | null | Value[]; // a bigint is an int, a number is a float

export function literal(text: string): Value {
  const trimmed = text.trim();
  if (trimmed === "") return null;
  if (/^[+-]?\d+$/.test(trimmed)) return BigInt(trimmed.replace("+", ""));
  if (/^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$/.test(trimmed)) return Number(trimmed);
  return trimmed;
}

/** One value, or a list where there is a comma: "3, 3, 2". */
export function literals(text: string): Value {
  if (!text.includes(",")) return literal(text);
  return text.replace(/,\s*$/, "").split(",").map(literal);
}

export function repr(value: Value): string {
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(repr).join(", ")}]`;
  if (typeof value === "string") return reprOfString(value);
  if (typeof value === "number") return reprOfFloat(value);
  return String(value);
}

export function kindOf(value: Value): string {
  if (value === null) return "NoneType";
  if (Array.isArray(value)) return "list";
  return { bigint: "int", number: "float", string: "str" }[typeof value as "bigint" | "number" | "string"];
}

function reprOfString(text: string): string {
  const quote = text.includes("'") && !text.includes('"') ? '"' : "'";
  const escaped = text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll("\t", "\\t");
  return quote + (quote === "'" ? escaped.replaceAll("'", "\\'") : escaped) + quote;
}

/** The same digits as in JavaScript; the exponent begins at 1e16 and has two digits. */
function reprOfFloat(value: number): string {
  if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
  if (Object.is(value, -0)) return "-0.0";
  const [digits, exponent] = value.toExponential().split("e");
  const power = Number(exponent);
  if (value !== 0 && (power < -4 || power >= 16)) {
    return `${digits}e${power < 0 ? "-" : "+"}${String(Math.abs(power)).padStart(2, "0")}`;
  }
  return Number.isInteger(value) ? `${value}.0` : String(value);
}
