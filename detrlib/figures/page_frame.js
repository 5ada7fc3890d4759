// The page in the frame of a notebook: what it does not hold it asks the kernel for, by `ask` of its frame.
function render({model, el}) {
  const frame = document.createElement("iframe"), waiting = new Map();
  const answered = ({number, answer}) => { waiting.get(number)?.(answer); waiting.delete(number); };
  const ask = asked => new Promise(done => {
    const number = `${Date.now()} ${Math.random()}`;  // a notebook may show the widget twice
    waiting.set(number, done);
    model.send({number, asked});
  });
  model.on("msg:custom", answered);
  Object.assign(frame, {ask, title: "viewer", srcdoc: model.get("page")});
  frame.style.cssText = `width: 100%; height: ${model.get("height")}px; border: 0`;
  el.append(frame);
  return () => model.off("msg:custom", answered);
}

export default {render};
