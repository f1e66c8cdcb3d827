// A simulated accelerator for PyTorch, which needs no GPU: the device "sim" (PrivateUse1, renamed by simulated.py).
//
//   devices      SIM_DEVICES of them (4); each thread has its own current device, as with CUDA.
//   streams      each is a thread of its own with a queue, so streams really overlap, and what is not ordered by an
//                event really comes in the wrong order; each thread has its own current stream on each device.
//   memory       host memory, in free lists for each stream as CUDA's caching allocator keeps them: a block that is
//                freed while its stream still works is handed out again at once, to that stream only, unless
//                `record_stream` has named others. Fresh memory is filled with 0xAB.
//   copies       asynchronous from and to registered ("pinned") host memory, else waited for. They take the time
//                that `set_cost` says, and wait while `hold(True)` is set. A copy whose host memory is no longer
//                registered when its turn comes is not made, and counted as a fault.
//   operators    everything else runs on the host over the same memory, after the current stream's work.
//   collectives  `enqueue` puts a Python function on a device's current stream; the stream waits for it, the caller
//                does not (as with NCCL).
//   disorder     `set_jitter` makes each piece of a stream's work wait for a random while first.
//   failures     on demand, registrations of host memory fail, and allocations run out of memory.
//   counters     `counts()`: copies, synchronizations and operators by kind, with times and bytes.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <thread>

using namespace c10;

static constexpr DeviceType SIM = DeviceType::PrivateUse1;

static double from_environment(const char* name, double otherwise) {
  const char* given = getenv(name);
  return given ? atof(given) : otherwise;
}

static int device_count() {
  static int count = static_cast<int>(from_environment("SIM_DEVICES", 4));
  return count;
}

// ---- counters and the cost of copies

static std::mutex counts_mutex;
static std::map<std::string, std::pair<int64_t, int64_t>> counts;  // what -> (times, bytes)

static void count(const std::string& what, int64_t bytes = 0) {
  std::lock_guard<std::mutex> guard(counts_mutex);
  auto& found = counts[what];
  found.first++;
  found.second += bytes;
}

static std::atomic<double> pinned_rate{50e9}, pageable_rate{6e9}, latency{8e-6};  // bytes per second, seconds

static std::mutex hold_mutex;
static std::condition_variable hold_changed;
static bool held = false;

static std::mutex random_mutex;
static std::mt19937_64 random_source;
static std::atomic<double> jitter{0};  // seconds that a piece of work waits at most

static void wait_a_while() {
  if (jitter == 0) return;
  double share;
  {
    std::lock_guard<std::mutex> guard(random_mutex);
    share = std::uniform_real_distribution<double>(0, 1)(random_source);
  }
  // Mostly short, sometimes long: what comes in another order are the few that are late.
  std::this_thread::sleep_for(std::chrono::duration<double>(jitter * share * share * share));
}

static void spend(int64_t bytes, bool pinned) {
  std::this_thread::sleep_for(std::chrono::duration<double>(latency + bytes / (pinned ? pinned_rate : pageable_rate)));
  std::unique_lock<std::mutex> lock(hold_mutex);
  hold_changed.wait(lock, [] { return !held; });
}

// ---- registered host memory

static std::mutex registered_mutex;
static std::map<uintptr_t, size_t> registered;

static bool is_registered(const void* data, size_t bytes) {
  std::lock_guard<std::mutex> guard(registered_mutex);
  auto after = registered.upper_bound(reinterpret_cast<uintptr_t>(data));
  if (after == registered.begin()) return false;
  --after;
  return reinterpret_cast<uintptr_t>(data) + bytes <= after->first + after->second;
}

// ---- streams and events

struct WithoutGil {  // whoever waits for a device lets Python go on
  PyThreadState* state = nullptr;
  WithoutGil() { if (PyGILState_Check()) state = PyEval_SaveThread(); }
  ~WithoutGil() { if (state) PyEval_RestoreThread(state); }
};

class Queue {
 public:
  Queue() { std::thread([this] { work(); }).detach(); }

  void put(std::function<void()> job) {
    {
      std::lock_guard<std::mutex> guard(mutex_);
      jobs_.push_back(std::move(job));
      issued_++;
    }
    more_.notify_one();
  }

  void synchronize() {
    WithoutGil released;
    std::unique_lock<std::mutex> lock(mutex_);
    auto until = issued_;
    less_.wait(lock, [&] { return done_ >= until; });
  }

  bool idle() {
    std::lock_guard<std::mutex> guard(mutex_);
    return done_ == issued_;
  }

 private:
  void work() {
    for (;;) {
      std::function<void()> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        more_.wait(lock, [&] { return !jobs_.empty(); });
        job = std::move(jobs_.front());
        jobs_.pop_front();
      }
      wait_a_while();
      job();
      {
        std::lock_guard<std::mutex> guard(mutex_);
        done_++;
      }
      less_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable more_, less_;
  std::deque<std::function<void()>> jobs_;
  uint64_t issued_ = 0, done_ = 0;
};

static std::mutex queues_mutex;
static std::map<std::pair<int, StreamId>, Queue*> queues;  // never deleted: their threads live as long as the process
static std::atomic<StreamId> next_stream{1};               // 0 is a device's default stream

static Queue& queue(int device, StreamId id) {
  std::lock_guard<std::mutex> guard(queues_mutex);
  auto& found = queues[{device, id}];
  if (!found) found = new Queue();
  return *found;
}

static thread_local int current_device = 0;
static thread_local std::map<int, StreamId> current_streams;

static StreamId current_id(int device) {
  auto found = current_streams.find(device);
  return found == current_streams.end() ? 0 : found->second;
}

static Queue& current_queue(int device) { return queue(device, current_id(device)); }

struct SimEvent {
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t wanted = 0, reached = 0;

  uint64_t recorded() {
    std::lock_guard<std::mutex> guard(mutex);
    return wanted;
  }
  void reach(uint64_t number) {
    {
      std::lock_guard<std::mutex> guard(mutex);
      reached = std::max(reached, number);
    }
    changed.notify_all();
  }
  void wait(uint64_t number) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return reached >= number; });
  }
};

struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return SIM; }
  Device exchangeDevice(Device device) const override {
    int before = current_device;
    current_device = device.index();
    return Device(SIM, before);
  }
  Device getDevice() const override { return Device(SIM, current_device); }
  void setDevice(Device device) const override { current_device = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { current_device = device.index(); }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }

  Stream getStream(Device device) const override {
    return Stream(Stream::UNSAFE, device, current_id(device.index()));
  }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::UNSAFE, device, 0); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  Stream getNewStream(Device device, int) const override {
    int index = device.has_index() ? device.index() : current_device;
    return Stream(Stream::UNSAFE, Device(SIM, index), next_stream++);
  }
  Stream exchangeStream(Stream stream) const override {
    auto before = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }
  bool queryStream(const Stream& stream) const override { return queue(stream.device_index(), stream.id()).idle(); }
  void synchronizeStream(const Stream& stream) const override {
    count("stream.synchronize");
    queue(stream.device_index(), stream.id()).synchronize();
  }
  void synchronizeDevice(const DeviceIndex device) const override {
    count("device.synchronize");
    std::vector<Queue*> found;
    {
      std::lock_guard<std::mutex> guard(queues_mutex);
      for (auto& [key, each] : queues) if (key.first == device) found.push_back(each);
    }
    for (auto each : found) each->synchronize();
  }

  void record(void** event, const Stream& stream, const DeviceIndex, const EventFlag) const override {
    if (!*event) *event = new SimEvent();
    auto* recorded = static_cast<SimEvent*>(*event);
    uint64_t number;
    {
      std::lock_guard<std::mutex> guard(recorded->mutex);
      number = ++recorded->wanted;
    }
    queue(stream.device_index(), stream.id()).put([recorded, number] { recorded->reach(number); });
  }
  void block(void* event, const Stream& stream) const override {
    if (!event) return;
    auto* awaited = static_cast<SimEvent*>(event);
    auto number = awaited->recorded();
    queue(stream.device_index(), stream.id()).put([awaited, number] { awaited->wait(number); });
  }
  bool queryEvent(void* event) const override {
    if (!event) return true;
    auto* asked = static_cast<SimEvent*>(event);
    std::lock_guard<std::mutex> guard(asked->mutex);
    return asked->reached >= asked->wanted;
  }
  void synchronizeEvent(void* event) const override {
    if (!event) return;
    count("event.synchronize");
    WithoutGil released;
    auto* awaited = static_cast<SimEvent*>(event);
    awaited->wait(awaited->recorded());
  }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}  // streams may still refer to it
  void recordDataPtrOnStream(const DataPtr& data, const Stream& stream) const override;
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---- memory

struct Block {
  void* data;
  size_t bytes;
  int device;
  StreamId stream;
  std::vector<Stream> used;  // by record_stream
};

static std::mutex memory_mutex;
static std::map<void*, Block*> blocks;
static std::map<std::tuple<int, StreamId, size_t>, std::vector<Block*>> freed;
static std::map<int, int64_t> live, peak, fresh;  // by device: bytes, bytes, allocations that no free block served

static void to_free_list(Block* block) {
  std::lock_guard<std::mutex> guard(memory_mutex);
  freed[{block->device, block->stream, block->bytes}].push_back(block);
}

static void release(void* data) {
  if (!data) return;
  Block* block;
  {
    std::lock_guard<std::mutex> guard(memory_mutex);
    block = blocks.at(data);
    live[block->device] -= block->bytes;
  }
  auto used = std::move(block->used);
  block->used.clear();
  if (used.empty()) return to_free_list(block);
  auto left = std::make_shared<std::atomic<int>>(static_cast<int>(used.size()));
  for (auto& stream : used)
    queue(stream.device_index(), stream.id()).put([block, left] { if (--*left == 0) to_free_list(block); });
}

static std::map<int, int64_t> allocations_left;  // by device, where they are to run out

static void check_memory(int device, size_t bytes) {  // with `memory_mutex`
  auto found = allocations_left.find(device);
  if (found == allocations_left.end()) return;
  TORCH_CHECK_WITH(OutOfMemoryError, found->second > 0, "sim:", device, " out of memory. Tried to allocate ", bytes);
  found->second--;
}

struct SimAllocator final : DeviceAllocator {
  DataPtr allocate(size_t bytes) override {
    int device = current_device;
    bytes = (bytes + 511) / 512 * 512;
    if (!bytes) return {nullptr, nullptr, &release, Device(SIM, device)};
    StreamId stream = current_id(device);
    std::lock_guard<std::mutex> guard(memory_mutex);
    check_memory(device, bytes);
    auto& list = freed[{device, stream, bytes}];
    Block* block;
    if (list.empty()) {
      block = new Block{nullptr, bytes, device, stream, {}};
      if (posix_memalign(&block->data, 512, bytes)) throw std::bad_alloc();
      memset(block->data, 0xAB, bytes);
      blocks[block->data] = block;
      fresh[device]++;
    } else {
      block = list.back();
      list.pop_back();
    }
    live[device] += bytes;
    peak[device] = std::max(peak[device], live[device]);
    return {block->data, block->data, &release, Device(SIM, device)};
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(MempoolId_t) override {}
  void recordStream(const DataPtr& data, Stream stream) override { Guard().recordDataPtrOnStream(data, stream); }
  CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    CachingDeviceAllocator::DeviceStats stats{};
    stats.allocated_bytes[0].current = live[device];
    stats.allocated_bytes[0].peak = peak[device];
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex device) override { peak[device] = live[device]; }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    size_t total = static_cast<size_t>(from_environment("SIM_MEMORY_GB", 80) * 1e9);
    return {total - live[device], total};
  }
};
static SimAllocator allocator;
REGISTER_ALLOCATOR(SIM, &allocator);

void Guard::recordDataPtrOnStream(const DataPtr& data, const Stream& stream) const {
  std::lock_guard<std::mutex> guard(memory_mutex);
  auto found = blocks.find(data.get());
  if (found != blocks.end() && stream.id() != found->second->stream) found->second->used.push_back(stream);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count(); }
  void setCurrentDevice(DeviceIndex device) const override { current_device = device; }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return std::exchange(current_device, device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  bool isPinnedPtr(const void* data) const override { return is_registered(data, 1); }
  Allocator* getPinnedMemoryAllocator() const override { return GetAllocator(DeviceType::CPU); }
  Device getDeviceFromPtr(void*) const override { return Device(SIM, current_device); }
  void resizePrivateUse1Bytes(const Storage& storage, size_t bytes) const override {
    OptionalDeviceGuard there(storage.device());
    auto* own = storage.unsafeGetStorageImpl();
    auto data = allocator.allocate(bytes);
    if (own->nbytes() && bytes) memcpy(data.get(), own->data(), std::min(bytes, own->nbytes()));
    own->set_data_ptr_noswap(std::move(data));
    own->set_nbytes(bytes);
  }
};
static int hooked = [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); return 0; }();

// ---- tensors

static bool is_sim(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == SIM; }

static at::Tensor host_view(const at::Tensor& tensor) {  // the same memory as a CPU tensor
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  auto view = at::from_blob(const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(), options);
  if (tensor.is_conj()) view = view.conj();
  if (tensor.is_neg()) view = view._neg_view();
  return view;
}

static void await_stream(const at::Tensor& tensor) {
  if (is_sim(tensor)) current_queue(tensor.device().index()).synchronize();
}

static int index_of(std::optional<Device> device) {
  return device && device->has_index() ? device->index() : current_device;
}

static at::Tensor sim_empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                            std::optional<Device> device, std::optional<bool>,
                            std::optional<at::MemoryFormat> format) {
  OptionalDeviceGuard there(Device(SIM, index_of(device)));
  return at::detail::empty_generic(size, &allocator, DispatchKeySet(DispatchKey::PrivateUse1),
                                   dtype.value_or(at::kFloat), format);
}

static at::Tensor sim_empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                                    std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  OptionalDeviceGuard there(Device(SIM, index_of(device)));
  return at::detail::empty_strided_generic(size, stride, &allocator, DispatchKeySet(DispatchKey::PrivateUse1),
                                           dtype.value_or(at::kFloat));
}

// Between host and device: in the current stream; asynchronous where the host's memory is pinned.
static void copy_over(const at::Tensor& from, const at::Tensor& to, bool non_blocking, bool plain) {
  bool in = !is_sim(from);
  const at::Tensor &host = in ? from : to, &there = in ? to : from;
  int64_t bytes = to.numel() * to.element_size();
  const void* host_data = host.const_data_ptr();
  bool pinned = is_registered(host_data, 1), asynchronous = non_blocking && pinned && plain;
  count(std::string(in ? "H2D " : "D2H ") + (pinned ? "pinned " : "pageable ") + (asynchronous ? "async" : "sync") +
            (plain ? "" : " gathered"), bytes);
  Queue& stream = current_queue(there.device().index());
  if (!plain) {  // CUDA makes contiguous temporaries on both sides, and waits
    stream.synchronize();
    spend(bytes, pinned && from.is_contiguous());
    (in ? host_view(to) : to).copy_(in ? from : host_view(from));
    return;
  }
  void* data = to.mutable_data_ptr();
  const void* source = from.const_data_ptr();
  stream.put([=] {
    spend(bytes, pinned);
    if (pinned && !is_registered(host_data, bytes)) return count("FAULT: host memory is gone before its copy", bytes);
    memcpy(data, source, bytes);
  });
  if (!asynchronous) stream.synchronize();
}

static at::Tensor sim_copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  bool plain = from.scalar_type() == to.scalar_type() && from.is_contiguous() && to.is_contiguous() &&
               from.sizes() == to.sizes() && !from.is_conj() && !from.is_neg();
  int64_t bytes = to.numel() * to.element_size();
  if (!bytes) return to;
  if (!is_sim(from) || !is_sim(to)) {
    copy_over(from, to, non_blocking, plain);
    return to;
  }
  if (from.device() == to.device() && plain) {  // in the stream's order, as a kernel is
    count("D2D", bytes);
    void* data = to.mutable_data_ptr();
    const void* source = from.const_data_ptr();
    current_queue(to.device().index()).put([=] { memmove(data, source, bytes); });
    return to;
  }
  count(from.device() == to.device() ? "D2D" : "between devices", bytes);
  await_stream(from);
  await_stream(to);
  host_view(to).copy_(host_view(from));
  return to;
}

static at::Tensor sim_copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (from.sizes() != to.sizes()) const_cast<at::Tensor&>(to).resize_(from.sizes());
  return sim_copy_from(from, to, false);
}

static at::Scalar sim_local_scalar(const at::Tensor& tensor) {
  count("item()");
  await_stream(tensor);
  return host_view(tensor).item();
}

static at::Tensor& sim_set_storage(at::Tensor& self, at::Storage storage, int64_t offset, IntArrayRef size,
                                   IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, storage, offset, size, stride);
}

static void sim_record_stream(at::Tensor& tensor, Stream stream) {
  Guard().recordDataPtrOnStream(tensor.storage().data_ptr(), stream);
}

static const at::Tensor& sim_resize(const at::Tensor& self, SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  size_t bytes = (c10::multiply_integers(sizes) + self.storage_offset()) * self.element_size();
  if (bytes > self.storage().nbytes()) {
    await_stream(self);
    Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

// ---- every other operator: on the host, over the same memory, when the current stream has done its work

struct OnHost {
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // a tensor of the device, and its view on the host
  std::optional<Device> device;

  at::Tensor to_host(const at::Tensor& tensor) {
    if (!is_sim(tensor)) return tensor;
    if (!device || tensor.dim()) device = tensor.device();
    await_stream(tensor);
    auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
    auto view = tensor.numel() ? host_view(tensor) : at::empty(tensor.sizes(), options);
    pairs.emplace_back(tensor, view);
    return view;
  }

  at::Tensor to_device(const at::Tensor& result) {
    if (!result.defined() || result.device().type() != at::kCPU) return result;
    for (auto& [own, view] : pairs) {
      if (result.unsafeGetTensorImpl() != view.unsafeGetTensorImpl()) continue;
      if (result.sizes() != own.sizes()) {
        own.resize_(result.sizes());
        own.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides());
        if (result.numel()) host_view(own).copy_(result);
      }
      return own;
    }
    auto there = device.value_or(Device(SIM, current_device));
    auto made = at::empty_strided(result.sizes(), result.strides(), result.options().device(there));
    if (result.numel()) host_view(made).copy_(result);
    return made;
  }

  IValue argument(const IValue& value) {
    if (value.isTensor()) return to_host(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> found;
      for (const at::Tensor& each : value.toTensorVector()) found.push_back(to_host(each));
      return IValue(found);
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> found;
      for (std::optional<at::Tensor> each : value.toOptionalTensorList().vec())
        found.push_back(each && each->defined() ? std::optional<at::Tensor>(to_host(*each)) : each);
      return IValue(found);
    }
    if (value.isDevice() && value.toDevice().type() == SIM) {
      device = Device(SIM, index_of(value.toDevice()));
      return IValue(Device(at::kCPU));
    }
    return value;
  }

  IValue returned(const IValue& value) {
    if (value.isTensor()) return to_device(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> found;
      for (const at::Tensor& each : value.toTensorVector()) found.push_back(to_device(each));
      return IValue(found);
    }
    return value;
  }
};

static void on_host(const OperatorHandle& op, torch::jit::Stack* stack) {
  auto& schema = op.schema();
  OnHost host;
  for (size_t i = stack->size() - schema.arguments().size(); i < stack->size(); i++)
    (*stack)[i] = host.argument((*stack)[i]);
  count("op " + schema.name());
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++)
    (*stack)[i] = host.returned((*stack)[i]);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &sim_empty);
  m.impl("empty_strided", &sim_empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("_copy_from", &sim_copy_from);
  m.impl("_copy_from_and_resize", &sim_copy_from_and_resize);
  m.impl("_local_scalar_dense", &sim_local_scalar);
  m.impl("resize_", &sim_resize);
  m.impl("set_.source_Storage_storage_offset", &sim_set_storage);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("record_stream", &sim_record_stream);
}

// ---- what Python sees; the rest is in simulated.py

static std::atomic<bool> registrations_fail{false};

static int host_register(uintptr_t data, size_t bytes) {
  std::lock_guard<std::mutex> guard(registered_mutex);
  if (registrations_fail) return 2;  // cudaErrorMemoryAllocation
  registered[data] = bytes;
  return 0;
}

static int host_unregister(uintptr_t data) {
  std::lock_guard<std::mutex> guard(registered_mutex);
  return registered.erase(data) ? 0 : 1;
}

static void enqueue(int device, py::function function) {
  auto kept = std::make_shared<py::function>(std::move(function));
  current_queue(device).put([kept]() mutable {
    py::gil_scoped_acquire locked;
    (*kept)();
    kept.reset();
  });
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("host_register", &host_register);
  m.def("host_unregister", &host_unregister);
  m.def("registered", [] { std::lock_guard<std::mutex> guard(registered_mutex); return registered; });
  m.def("counts", [] { std::lock_guard<std::mutex> guard(counts_mutex); return counts; });
  m.def("reset_counts", [] { std::lock_guard<std::mutex> guard(counts_mutex); counts.clear(); });
  m.def("memory", [] { std::lock_guard<std::mutex> guard(memory_mutex); return std::make_tuple(live, peak, fresh); });
  m.def("device_count", &device_count);
  m.def("current_device", [] { return current_device; });
  m.def("host_view", &host_view);
  m.def("enqueue", &enqueue);
  m.def("set_cost", [](double pinned, double pageable, double seconds) {
    pinned_rate = pinned;
    pageable_rate = pageable;
    latency = seconds;
  });
  m.def("set_jitter", [](uint64_t seed, double seconds) {
    std::lock_guard<std::mutex> guard(random_mutex);
    random_source.seed(seed);
    jitter = seconds;
  });
  m.def("fail_registrations", [](bool now) { registrations_fail = now; });
  m.def("run_out_of_memory", [](int device, int64_t allocations) {  // after so many more; negative: not any more
    std::lock_guard<std::mutex> guard(memory_mutex);
    if (allocations < 0) allocations_left.erase(device);
    else allocations_left[device] = allocations;
  });
  m.def("hold", [](bool now) {
    { std::lock_guard<std::mutex> guard(hold_mutex); held = now; }
    hold_changed.notify_all();
  });
}
