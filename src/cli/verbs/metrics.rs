//! `drctl metrics`: the figures of a daemon, on a host that runs none.

use std::path::PathBuf;
use std::time::Duration;

use crate::app::{self, Role, World};
use crate::cli::Session;
use crate::cli::exit::Exit;
use crate::config::{Settings, load_schedules};
use crate::jobs::metrics::{self, receivers, standbys};
use crate::jobs::reach;
use crate::model::Result;
use crate::observe::metrics::{Page, table};

/// How long a region may take to say that it is there.
const ASK_LIMIT: Duration = Duration::from_secs(10);

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Replace this file, for node_exporter's textfile collector (name it *.prom), instead of printing
    #[arg(long, value_name = "PATH")]
    textfile: Option<PathBuf>,
}

/// Runs the verb. What could be found out is written also when the regions do not answer.
///
/// # Errors
/// No region answers, the schedules are wrong, or the file cannot be written.
pub async fn run(args: Args, session: &Session) -> Result<Exit> {
    let (settings, world) = (session.settings()?, World::real());
    let mut page = Page::default();
    page.set(&table::BUILD_INFO, [env!("CARGO_PKG_VERSION")], 1.0);
    page.extend(receivers::page(&receivers::ask(&app::targets(&settings)?).await));
    page.extend(standbys::page(&settings.repository.state_dir).await);
    regions(&settings, &world, &mut page).await?;
    let read = read(&settings, &world, &mut page).await;
    page.extend(world.meters.page());
    match &args.textfile {
        Some(path) => app::replace(path, &page.text(world.meters.histograms())?)?,
        None if session.output.json => session.output.print_json(&page.rows())?,
        None => session.output.print(&page.text(world.meters.histograms())?)?,
    }
    read.map(|()| Exit::Ok)
}

async fn regions(settings: &Settings, world: &World, page: &mut Page) -> Result<()> {
    for region in &settings.regions {
        let opened = app::region(settings, region, Role::Restore, world).await?;
        let up = reach::run(&opened, ASK_LIMIT).await.is_ok();
        page.set(&table::REGION_UP, [region.name.as_str()], f64::from(u8::from(up)));
    }
    Ok(())
}

async fn read(settings: &Settings, world: &World, page: &mut Page) -> Result<()> {
    let context = app::context(settings, Role::Restore, world).await?;
    page.extend(metrics::read(&context, &load_schedules(settings)?).await?);
    page.extend(metrics::stored(&context.repository).await);
    Ok(())
}
