//! Tokens for nanoGPT: `train.bin` and `val.bin` of 16-bit tokens without a header. (llm.c's files are our own form, and
//! nanoGPT's are read as they are, with `data.dtype = "uint16"`.)

use mupscale::{
    Error, Result,
    data::{
        dataset::DatasetInfo,
        output::Partial,
        shard::{Shard, TokenDtype, Tokens},
    },
};
use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

/// Writes a dataset folder's parts, or one file of tokens as `train.bin`.
pub fn to_nanogpt(data: &Path, out: &Path, force: bool) -> Result<()> {
    let shards: Vec<(&str, Vec<PathBuf>)> = match DatasetInfo::read(data)? {
        Some(info) => {
            let paths = |part: &mupscale::data::dataset::PartInfo| {
                part.shards.iter().map(|shard| data.join(&shard.name)).collect::<Vec<_>>()
            };
            vec![("train.bin", paths(&info.train)), ("val.bin", paths(&info.val))]
        }
        None if data.is_file() => vec![("train.bin", vec![data.into()])],
        None => return Err(Error::file(data, "is neither a dataset folder (with dataset.json) nor a .bin file")),
    };
    let partial = Partial::folder(out, force, "train.bin")?;
    for (name, paths) in shards.into_iter().filter(|(_, paths)| !paths.is_empty()) {
        let path = partial.path().join(name);
        let mut file = BufWriter::with_capacity(1 << 20, File::create(&path).map_err(Error::io("create", &path))?);
        for shard in paths {
            let shard = Shard::open(&shard, None, None)?;
            if let Some(token) = shard.max_token().filter(|&token| token > u16::MAX.into()) {
                let limit = TokenDtype::Uint16;
                let why = format!("holds the token {token}, which nanoGPT's {limit} files cannot");
                return Err(Error::file(shard.path(), why));
            }
            let written = match shard.tokens() {
                Tokens::Uint16(tokens) => file.write_all(bytemuck::cast_slice(tokens)),
                Tokens::Uint32(tokens) => tokens.iter().try_for_each(|&t| file.write_all(&(t as u16).to_le_bytes())),
            };
            written.map_err(Error::io("write", &path))?;
        }
        file.flush().and_then(|()| file.get_ref().sync_all()).map_err(Error::io("write", &path))?;
    }
    partial.publish()
}
