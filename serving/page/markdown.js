// A small part of Markdown as DOM nodes. Text only ever becomes text nodes, so whatever a model writes is shown,
// never run: there is no innerHTML here.

const BLOCK = /^(```|~~~|#{1,6}\s|\s*([-*+]|\d+[.)])\s|>\s?|\s*\|.*\|\s*$|(-{3,}|\*{3,})\s*$)/;

/** A fragment for the text of an answer, which may still be growing. */
export function render(text) {
  const fragment = document.createDocumentFragment();
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  for (let i = 0; i < lines.length; ) {
    const take = (block) => ((i = block.next), fragment.append(block.node));
    const line = lines[i];
    if (!line.trim()) i++;
    else if (/^(```|~~~)/.test(line)) take(code(lines, i));
    else if (/^#{1,6}\s/.test(line)) take(heading(lines, i));
    else if (/^(-{3,}|\*{3,})\s*$/.test(line)) take({ node: element("hr"), next: i + 1 });
    else if (/^>\s?/.test(line)) take(quote(lines, i));
    else if (isTable(lines, i)) take(table(lines, i));
    else if (/^\s*([-*+]|\d+[.)])\s/.test(line)) take(list(lines, i));
    else take(paragraph(lines, i));
  }
  return fragment;
}

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

function code(lines, start) {
  const fence = lines[start].slice(0, 3);
  let end = start + 1;
  while (end < lines.length && !lines[end].startsWith(fence)) end++;
  const content = lines.slice(start + 1, end).join("\n");
  const button = element("button", "复制");
  button.className = "copy";
  button.addEventListener("click", () => copy(content, button));
  const bar = element("div", element("span", lines[start].slice(3).trim() || "代码"), button);
  const node = element("div", bar, element("pre", element("code", content)));
  node.className = "code";
  return { node, next: end + 1 };
}

function heading(lines, start) {
  const [, marks, text] = lines[start].match(/^(#{1,6})\s+(.*)$/) ?? [null, "#", lines[start]];
  return { node: element(`h${Math.min(marks.length + 1, 6)}`, ...inline(text)), next: start + 1 };
}

function quote(lines, start) {
  let end = start;
  while (end < lines.length && lines[end].startsWith(">")) end++;
  const inner = lines.slice(start, end).map((line) => line.replace(/^>\s?/, "").replace(/^>+/, ""));
  return { node: element("blockquote", render(inner.join("\n"))), next: end };
}

function isTable(lines, start) {
  return lines[start].includes("|") && /^\s*\|?(\s*:?-+:?\s*\|)+\s*:?-*:?\s*$/.test(lines[start + 1] ?? "");
}

function table(lines, start) {
  const row = (line, name) =>
    element("tr", ...line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => element(name, ...inline(cell.trim()))));
  let end = start + 2;
  while (end < lines.length && lines[end].includes("|")) end++;
  const body = element("tbody", ...lines.slice(start + 2, end).map((line) => row(line, "td")));
  const node = element("div", element("table", element("thead", row(lines[start], "th")), body));
  node.className = "table";
  return { node, next: end };
}

function list(lines, start) {
  const isOrdered = /^\s*\d/.test(lines[start]);
  const node = element(isOrdered ? "ol" : "ul");
  if (isOrdered) node.start = parseInt(lines[start].trim(), 10);
  let end = start;
  for (let last = null; end < lines.length; end++) {
    const item = lines[end].match(/^(\s*)([-*+]|\d+[.)])\s+(.*)$/);
    if (item && item[1].length >= 2 && last) nested(last, item);
    else if (item && /\d/.test(item[2]) === isOrdered) node.append((last = element("li", ...inline(item[3]))));
    else break;
  }
  return { node, next: Math.max(end, start + 1) };
}

function nested(parent, [, , mark, text]) {
  const name = /\d/.test(mark) ? "ol" : "ul";
  if (parent.lastElementChild?.localName !== name) parent.append(element(name));
  parent.lastElementChild.append(element("li", ...inline(text)));
}

function paragraph(lines, start) {
  let end = start + 1;
  while (end < lines.length && lines[end].trim() && !BLOCK.test(lines[end])) end++;
  const node = element("p");
  lines.slice(start, end).forEach((line, i) => node.append(...(i ? [element("br")] : []), ...inline(line)));
  return { node, next: end };
}

const INLINE = /`([^`]+)`|\*\*([^*]+)\*\*|\*([^*\s][^*]*)\*|~~([^~]+)~~|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)|(https?:\/\/[^\s<>（），。；！？、]+)/;

/** Nodes for code, bold, italic, struck-out text and links (http and https alone). */
function inline(text) {
  const nodes = [];
  for (let match; (match = text.match(INLINE)); text = text.slice(match.index + match[0].length)) {
    nodes.push(text.slice(0, match.index));
    const [, codeText, bold, italic, struck, label, target, bare] = match;
    if (codeText) nodes.push(element("code", codeText));
    else if (bold) nodes.push(element("strong", bold));
    else if (italic) nodes.push(element("em", italic));
    else if (struck) nodes.push(element("del", struck));
    else nodes.push(link(label ?? bare, target ?? bare));
  }
  return [...nodes, text];
}

function link(label, target) {
  const node = element("a", label);
  node.href = target;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  return node;
}

/** Put text on the clipboard and say so on the button; browsers allow it on https and localhost alone. */
export async function copy(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "已复制";
  } catch {
    const area = element("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    button.textContent = document.execCommand("copy") ? "已复制" : "复制失败";
    area.remove();
  }
  setTimeout(() => (button.textContent = before), 1500);
}
