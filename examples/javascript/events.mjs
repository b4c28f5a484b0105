// Reads server-sent events from an answer. Browsers have EventSource, which also reconnects.
export async function* events(answer) {
  let text = "";
  for await (const part of answer.body.pipeThrough(new TextDecoderStream())) {
    const blocks = (text + part).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const field = (name) => block.match(new RegExp(`^${name}: ?(.*)$`, "m"))?.[1];
      if (field("data")) yield { id: field("id"), data: JSON.parse(field("data")) };
    }
  }
}
