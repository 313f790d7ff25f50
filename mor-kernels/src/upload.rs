//! [`Upload`]: the contents of many tensors on their way to the device, through a few mapped buffers that several threads fill.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread;

use crate::error::{KernelError, Result};
use crate::gpu::Gpu;
use crate::submit::{FAILED, MAPPED, PENDING};
use crate::tensor::Tensor;

/// Bytes of a staging buffer, unless two rows need more: many enough that submits cost little beside them.
const STAGING_BYTES: usize = 4 << 20;
/// How often each staging buffer is filled at least, so that little is uploaded with little memory and by all threads.
const FILLS_PER_BUFFER: usize = 2;
/// Staging buffers of a thread, which fills one while the device copies from the other.
const BUFFERS_PER_THREAD: usize = 2;
/// Most threads that fill staging buffers, so that these stay few.
const MOST_THREADS: usize = 8;
/// What the places of rows in a staging buffer are multiples of: whole lines of memory, and whatever devices like to copy from.
const PART_ALIGNMENT: usize = 256;

/// Writes the rows of a tensor that it is asked for, to a [`Destination`].
type Source<'a> = Box<dyn Fn(Range<usize>, &mut Destination<'_>) + Sync + 'a>;

/// Tensors that are to be filled, and from what.
///
/// Several threads fill staging buffers that the device can read, each its own: while one is copied to its tensors, and mapped
/// again when that is done, the next is filled. A thread waits for the device only if all its buffers are under way.
pub struct Upload<'a> {
    gpu: &'a Gpu,
    contents: Vec<(Tensor, Source<'a>)>,
}

impl<'a> Upload<'a> {
    /// Of nothing yet.
    pub fn new(gpu: &'a Gpu) -> Self {
        Self { gpu, contents: Vec::new() }
    }

    /// Adds that `source` writes the rows of `tensor`, any of them at any time and on any thread.
    pub fn add(&mut self, tensor: Tensor, source: impl Fn(Range<usize>, &mut Destination<'_>) + Sync + 'a) {
        self.contents.push((tensor, Box::new(source)));
    }

    /// Fills the tensors before any work submitted later, and returns when the last copy has been submitted. `progress` is told
    /// the bytes so far.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] if staging buffers cannot be had, [`KernelError::Device`] if the device fails.
    ///
    /// # Panics
    /// If a source writes more or less than the rows it is asked for.
    pub fn run(self, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let threads = thread::available_parallelism().map_or(1, |n| n.get()).min(MOST_THREADS);
        let total: usize = self.contents.iter().map(|(tensor, _)| tensor.data_bytes()).sum();
        let pieces = self.pieces(STAGING_BYTES.min(total.div_ceil(FILLS_PER_BUFFER * BUFFERS_PER_THREAD * threads)));
        let num_threads = threads.min(pieces.len());
        let bytes = pieces.iter().map(|piece| piece.staged_bytes).max().unwrap_or_default();
        let next = AtomicUsize::new(0);
        let send = |piece: &Piece, buffers: &mut VecDeque<Staging>| {
            // Made by the threads, since new buffers are mapped full of zeros.
            let mut buffer = match buffers.len() {
                BUFFERS_PER_THREAD => buffers.pop_front().expect("there is one"),
                _ => Staging::new(self.gpu, bytes as u64)?,
            };
            let sent = self.send(piece, &mut buffer);
            buffers.push_back(buffer);
            sent
        };
        let work = |done: Sender<u64>| {
            let mut buffers = VecDeque::new();
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                // After a failure there is nothing left to do for the others.
                let sent = send(piece, &mut buffers).inspect_err(|_| next.store(pieces.len(), Ordering::Relaxed));
                // The receiver stays until all threads have ended.
                let _ = done.send(sent?);
            }
            Ok(())
        };
        thread::scope(|scope| {
            let (sender, done) = mpsc::channel();
            let start = |_| {
                let (work, sender) = (&work, sender.clone());
                scope.spawn(move || work(sender))
            };
            let workers: Vec<_> = (0..num_threads).map(start).collect();
            drop(sender);
            let mut total = 0;
            for bytes in done {
                total += bytes;
                progress(total);
            }
            let results =
                workers.into_iter().map(|worker| worker.join().unwrap_or_else(|p| std::panic::resume_unwind(p)));
            // All threads have to be waited for, whatever the first says.
            results.collect::<Vec<_>>().into_iter().collect::<Result<()>>()
        })?;
        self.contents.iter().for_each(|(tensor, _)| tensor.copy_to_texels(self.gpu));
        self.gpu.check()
    }

    /// The rows of all tensors in pieces of about `piece_bytes`.
    fn pieces(&self, piece_bytes: usize) -> Vec<Piece> {
        let (mut pieces, mut piece) = (Vec::new(), Piece::default());
        for (index, (tensor, _)) in self.contents.iter().enumerate() {
            let (num_rows, row_bytes) = tensor.rows();
            let mut first = 0;
            while first < num_rows {
                // Whole words: of two halves, where a row has an odd number of them.
                let room = piece_bytes.saturating_sub(piece.staged_bytes) / row_bytes.max(1) / 2 * 2;
                if room == 0 && piece.staged_bytes > 0 {
                    pieces.push(std::mem::take(&mut piece));
                    continue;
                }
                let rows = first..num_rows.min(first + room.max(2));
                first = rows.end;
                piece.staged_bytes += (rows.len() * row_bytes).next_multiple_of(PART_ALIGNMENT);
                piece.parts.push((index, rows));
            }
        }
        pieces.push(piece);
        pieces.retain(|piece| piece.staged_bytes > 0);
        pieces
    }

    /// Fills `buffer` with a piece once it is mapped, has it copied, and mapped again. Returns the bytes of the rows.
    fn send(&self, piece: &Piece, buffer: &mut Staging) -> Result<u64> {
        let gpu = self.gpu;
        buffer.wait(gpu)?;
        let mut view = buffer.buffer.get_mapped_range_mut(..).map_err(|error| failed(gpu, error.to_string()))?;
        let mut rest = view.slice(..);
        let descriptor = wgpu::CommandEncoderDescriptor { label: Some("upload") };
        let mut encoder = gpu.catch(|device, _| device.create_command_encoder(&descriptor));
        let (mut offset, mut total) = (0, 0);
        for (index, rows) in &piece.parts {
            let (tensor, source) = &self.contents[*index];
            let (_, row_bytes) = tensor.rows();
            let bytes = rows.len() * row_bytes;
            let (part, after) = std::mem::take(&mut rest).split_at(bytes.next_multiple_of(PART_ALIGNMENT));
            rest = after;
            let mut destination = Destination(part.into_slice(..bytes));
            source(rows.clone(), &mut destination);
            assert_eq!(destination.0.len(), 0, "{}: bytes that rows {rows:?} lack", tensor.label());
            let at = tensor.offset + (rows.start * row_bytes) as u64;
            // A tensor ends with whole words, whatever its elements do.
            let copied = bytes.next_multiple_of(wgpu::COPY_BUFFER_ALIGNMENT as usize) as u64;
            gpu.catch(|_, _| encoder.copy_buffer_to_buffer(&buffer.buffer, offset, &tensor.buffer, at, copied));
            offset += bytes.next_multiple_of(PART_ALIGNMENT) as u64;
            total += bytes as u64;
        }
        drop(view);
        buffer.submit(gpu, encoder);
        Ok(total)
    }
}

/// What a staging buffer takes to the device at once: rows of tensors, by their index.
#[derive(Debug, Default)]
struct Piece {
    parts: Vec<(usize, Range<usize>)>,
    staged_bytes: usize,
}

/// Where rows are written, one after the other and once; the memory may be such that reading it is very slow.
#[derive(Debug)]
pub struct Destination<'a>(wgpu::WriteOnly<'a, [u8]>);

impl Destination<'_> {
    /// Appends bytes.
    ///
    /// # Panics
    /// If they are more than are to come.
    pub fn write(&mut self, bytes: &[u8]) {
        self.take(bytes.len()).copy_from_slice(bytes);
    }

    /// Appends zeros.
    ///
    /// # Panics
    /// As [`Destination::write`].
    pub fn write_zeros(&mut self, num_bytes: usize) {
        self.take(num_bytes).fill(0);
    }

    fn take(&mut self, num_bytes: usize) -> wgpu::WriteOnly<'_, [u8]> {
        let (head, tail) = std::mem::take(&mut self.0).split_at(num_bytes);
        self.0 = tail;
        head
    }
}

/// A buffer between host and device: mapped, or on its way to be.
#[derive(Debug)]
struct Staging {
    buffer: wgpu::Buffer,
    state: Arc<AtomicU8>,
    /// What the device must have done before it is mapped.
    submitted: Option<wgpu::SubmissionIndex>,
}

impl Staging {
    fn new(gpu: &Gpu, bytes: u64) -> Result<Self> {
        use wgpu::BufferUsages as U;
        let buffer = gpu.create_mapped_buffer("upload", bytes, U::MAP_WRITE | U::COPY_SRC)?;
        Ok(Self { buffer, state: Arc::new(AtomicU8::new(MAPPED)), submitted: None })
    }

    /// What is called when the buffer is mapped, or cannot be.
    fn arrival(&self) -> impl FnOnce(Result<(), wgpu::BufferAsyncError>) + Send + 'static {
        let state = Arc::clone(&self.state);
        move |result| state.store(if result.is_ok() { MAPPED } else { FAILED }, Ordering::Release)
    }

    /// Waits until the buffer is mapped.
    fn wait(&self, gpu: &Gpu) -> Result<()> {
        loop {
            match self.state.load(Ordering::Acquire) {
                MAPPED => return Ok(()),
                FAILED => {
                    gpu.check()?;
                    return Err(failed(gpu, "no data can be sent to it: it is lost or was destroyed".to_owned()));
                }
                // Another thread, whose wait is over at the same time, may be the one that is told.
                _ => gpu.wait_for(self.submitted.clone())?,
            }
        }
    }

    /// Submits the copies from the buffer, after which it is mapped again.
    fn submit(&mut self, gpu: &Gpu, encoder: wgpu::CommandEncoder) {
        self.state.store(PENDING, Ordering::Relaxed);
        let arrival = self.arrival();
        self.submitted = Some(gpu.catch(|_, queue| {
            self.buffer.unmap();
            encoder.map_buffer_on_submit(&self.buffer, wgpu::MapMode::Write, .., arrival);
            queue.submit([encoder.finish()])
        }));
    }
}

fn failed(gpu: &Gpu, reason: String) -> KernelError {
    KernelError::Device { adapter: gpu.summary().name.clone(), reason }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::parity;
    use crate::tensor::DType;

    #[test]
    fn tensors_get_their_rows() {
        let gpu = parity::gpu();
        // More than all staging buffers hold, rows that are none of their parts, an odd number of halves, nothing, one row.
        let shapes = [
            (DType::U32, vec![25_000, 900]),
            (DType::F16, vec![3, 3, 7]),
            (DType::U32, vec![0, 8]),
            (DType::U32, vec![1]),
            (DType::Q8, vec![70_000, 256]),
            (DType::F32, vec![3, 1_500_000]),
        ];
        let value = |tensor: usize, row: usize, at: usize| (tensor * 89 + row * 31 + at * 7 + at / 256) as u8;
        let row = move |tensor, row, bytes| (0..bytes).map(|at| value(tensor, row, at)).collect::<Vec<u8>>();
        let mut upload = Upload::new(gpu);
        let mut tensors = Vec::new();
        for (index, (dtype, shape)) in shapes.into_iter().enumerate() {
            let tensor = Tensor::zeros(gpu, "filled", dtype, &shape).unwrap();
            let (_, row_bytes) = tensor.rows();
            upload.add(tensor.clone(), move |rows, out| {
                for at in rows {
                    // The first tensor's odd rows stay empty.
                    if index == 0 && at % 2 == 1 {
                        out.write_zeros(row_bytes);
                    } else {
                        out.write(&row(index, at, row_bytes));
                    }
                }
            });
            tensors.push(tensor);
        }
        let mut told = Vec::new();
        upload.run(&mut |bytes| told.push(bytes)).unwrap();
        assert!(told.is_sorted());
        assert_eq!(told.last().copied(), Some(tensors.iter().map(|tensor| tensor.data_bytes() as u64).sum()));
        for (index, tensor) in tensors.iter().enumerate().filter(|(_, tensor)| tensor.data_bytes() > 0) {
            let (_, row_bytes) = tensor.rows();
            for (at, found) in gpu.read::<u8>(tensor).unwrap().chunks(row_bytes).enumerate() {
                let expected = if index == 0 && at % 2 == 1 { vec![0; row_bytes] } else { row(index, at, row_bytes) };
                assert!(found == expected, "tensor {index}, row {at}");
            }
        }
        Upload::new(gpu).run(&mut |_| panic!("there is nothing to tell")).unwrap();
    }
}
