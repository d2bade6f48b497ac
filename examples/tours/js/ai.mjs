// Vercel's AI SDK with its provider for OpenAI-compatible servers: texts, streams, objects, tools, errors.
import assert from 'node:assert/strict'
import { createOpenAI } from '@ai-sdk/openai'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { APICallError, embedMany, generateText, isStepCount, Output, streamText, tool } from 'ai'
import { z } from 'zod'
import { MAX_TOKENS, QUESTION, TEXTS, check, differ, embedder, end, fleet } from './checks.mjs'

const provider = createOpenAICompatible({
  name: 'fleet', baseURL: fleet.v1, apiKey: fleet.key, includeUsage: true, supportsStructuredOutputs: true,
})
const brief = { prompt: QUESTION, temperature: 0, maxOutputTokens: MAX_TOKENS, maxRetries: 0 }
const wide = { ...brief, maxOutputTokens: 200 }
const city = z.object({ name: z.string(), is_capital: z.boolean() })
const said = {}

await check('base and adapter answer differently', async () => {
  for (const model of [fleet.base, fleet.adapter]) {
    const { text, usage } = await generateText({ model: provider(model), ...brief })
    said[model] = text
    assert.equal(usage.inputTokens + usage.outputTokens, usage.totalTokens)
    assert.ok(usage.outputTokens <= MAX_TOKENS)
  }
  differ(said[fleet.base], said[fleet.adapter])
})
await check('a stream equals the whole answer', async () => {
  for (const model of [fleet.base, fleet.adapter]) {
    const streamed = streamText({ model: provider(model), ...brief })
    let text = ''
    for await (const part of streamed.textStream) text += part
    assert.equal(text, said[model])
    assert.ok((await streamed.usage).outputTokens > 0)
  }
})
await check('an object, whole and streamed', async () => {
  for (const model of [fleet.base, fleet.adapter]) {
    const { output } = await generateText({ model: provider(model), output: Output.object({ schema: city }), ...wide })
    city.parse(output)
    const streamed = streamText({ model: provider(model), output: Output.object({ schema: city }), ...wide })
    let last
    for await (const part of streamed.partialOutputStream) last = part
    assert.deepEqual(last, output)
  }
})
await check('a tool is called, whole and streamed', async () => {
  const cities = []
  const weather = tool({
    description: 'Tell the weather of a city.', inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => { cities.push(city); return 'sunny' },
  })
  const forced = { model: provider(fleet.base), tools: { weather }, toolChoice: 'required', ...wide }
  const { toolCalls, toolResults } = await generateText(forced)
  assert.equal(toolCalls[0].toolName, 'weather')
  assert.equal(toolResults[0].output, 'sunny')
  const streamed = await streamText(forced).toolCalls
  assert.deepEqual(streamed[0].input, toolCalls[0].input)
  assert.equal(cities.length, toolCalls.length + streamed.length)
})
await check('on Responses: the chats\' texts, streams, an object, a tool and the step after it', async () => {
  const openai = createOpenAI({ baseURL: fleet.v1, apiKey: fleet.key })
  for (const model of [fleet.base, fleet.adapter]) {
    const { text } = await generateText({ model: openai.responses(model), ...brief })
    assert.equal(text, said[model])
    let streamed = ''
    for await (const part of streamText({ model: openai.responses(model), ...brief }).textStream) streamed += part
    assert.equal(streamed, said[model])
  }
  const model = openai.responses(fleet.base)
  const { output } = await generateText({ model, output: Output.object({ schema: city }), ...wide })
  city.parse(output)
  const weather = tool({
    description: 'Tell the weather of a city.', inputSchema: z.object({ city: z.string() }),
    execute: async () => 'sunny',
  })
  const run = await generateText({
    model, tools: { weather }, ...wide, stopWhen: isStepCount(2),
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? 'none' : 'required' }),
  })
  assert.equal(run.steps.length, 2)
  assert.equal(run.steps[0].toolResults[0].output, 'sunny')
})
if (embedder.url) {
  await check('embeddings of base and adapter', async () => {
    const there = createOpenAICompatible({ name: 'embedder', baseURL: `${embedder.url}/v1`, apiKey: fleet.key })
    const made = []
    for (const model of ['base', embedder.adapter]) {
      const { embeddings } = await embedMany({ model: there.embeddingModel(model), values: TEXTS, maxRetries: 0 })
      assert.equal(embeddings.length, TEXTS.length)
      made.push(embeddings)
    }
    differ(...made)
  })
}
await check('errors', async () => {
  const status = (code) => (error) => APICallError.isInstance(error) && error.statusCode === code
  await assert.rejects(generateText({ model: provider('nobody-has-this'), ...brief }), status(404))
  await assert.rejects(generateText({ model: provider(fleet.base), ...brief, maxOutputTokens: 2 ** 30 }), status(400))
})
end()
